"""The source side of a pipeline: one partition's batches are decoded, judged, timed, deduplicated and aggregated.

    RawBatch ─▶ decode ─▶ expectations ─▶ event time ─▶ steps (a tree) ─▶ windows ─▶ partials
                  │             │             │             │                │
                  └─────────────┴── dead letters ───────────┘           late records

Pure but for the keyed state of its dedupe steps. A record that becomes a dead letter before it has an event time moves
no watermark. Nothing here depends on where a batch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
import polars as pl

from streamproc.avro.decode import ROW, Decoded, Use, hash_names
from streamproc.avro.recordbatch import Columns
from streamproc.core.batch import I64, RawBatch
from streamproc.core.errors import invariant
from streamproc.core.hash128 import Hashes, combine, hash_series
from streamproc.core.limits import REASONS_COUNTED_MAX, TABLE_TEXT_BYTES_MAX
from streamproc.eventtime.spec import EARLIEST_MS, LATEST_MS, EventTime
from streamproc.eventtime.watermark import SourceClock
from streamproc.eventtime.windows import assign, late_mask, window_ends
from streamproc.operators.accumulate import PartialAggregator
from streamproc.operators.contract import KeyedState, Partial, SideRecord, WatermarkState
from streamproc.operators.dedupe import DUPLICATE, PASS, TOO_OLD, DedupeOperator
from streamproc.operators.expressions import Mask, RowExpr, check, evaluate
from streamproc.operators.forward import Forward
from streamproc.operators.groupkeys import physical_of
from streamproc.operators.plan import Dedupe, Expect, Filter, Node, SourcePlan, TablePlan, WithColumns
from streamproc.operators.side import side_record

__all__ = ["BatchDecoder", "Collected", "Counters", "SourceProgram", "projection"]

TIME: Final = "__time"
BEFORE: Final = "__watermark"
"""The watermark before the record."""

_SIDE_OVERHEAD_BYTES: Final = 512
_Kind: TypeAlias = Literal["dead", "late"]
_Ours: TypeAlias = tuple[tuple[str, bytes], ...]


class BatchDecoder(Protocol):
    """`avro.decode.Decoder`, made for the columns that `projection` names."""

    def decode(self, batch: RawBatch) -> Decoded: ...


class Aggregator(Protocol):
    """`accumulate.PartialAggregator`."""

    @property
    def size_bytes(self) -> int: ...

    def add(self, frame: pl.DataFrame, window_start: I64) -> None: ...

    def drain(self, source: int, sources: int, epoch: int, watermark: int, idle: bool) -> list[Partial]: ...

    def drop(self) -> None: ...


@dataclass
class Counters:
    """What became of a source's records, for the web view and the log."""

    records: int = 0
    dead: dict[str, int] = field(default_factory=dict)
    """By reason; once `REASONS_COUNTED_MAX` are there, new ones count as "other reasons"."""
    late: dict[str, int] = field(default_factory=dict)
    """By table; records too old to dedupe by the dedupe step's name."""
    duplicates: int = 0
    filtered: int = 0

    def add(self, other: Counters) -> None:
        self.records += other.records
        self.duplicates += other.duplicates
        self.filtered += other.filtered
        for reason, count in other.dead.items():
            self.count_dead(reason, count)
        for table, count in other.late.items():
            self.late[table] = self.late.get(table, 0) + count

    def count_dead(self, reason: str, count: int = 1) -> None:
        known = reason in self.dead or len(self.dead) < REASONS_COUNTED_MAX
        name = reason if known else "other reasons"
        self.dead[name] = self.dead.get(name, 0) + count


@dataclass(frozen=True)
class Collected:
    """What one epoch leaves, but for the dedupe state, which is in its overlays."""

    partials: dict[str, list[Partial]]
    """By table."""
    side: list[SideRecord]
    """Dead letters and late records, in offset order."""
    counts: Counters
    """Of this epoch."""
    forwarded: dict[str, list[Columns]] = field(default_factory=dict)
    """By topic: records that go on as they came, in offset order, in parts; a topic that nothing goes to is absent."""


def projection(plan: SourcePlan) -> dict[str, Use]:
    """Which columns of the topic the pipeline needs decoded, and how: what is only compared (dedupe keys, distinct
    counts) is only hashed. Called once per task, for its `Decoder`."""
    uses: dict[str, Use] = {plan.event_time.column: Use.VALUE}

    def want(names: Sequence[str], use: Use) -> None:
        for name in names:
            if name in plan.columns:
                uses[name] = uses[name] | use if name in uses else use

    counted: set[str] = set()
    for node in plan.root.nodes():
        match node.step:
            case Expect(rules=exprs) | WithColumns(columns=exprs):
                for expr in exprs.values():
                    want(expr.meta.root_names(), Use.VALUE)
            case Filter(predicate):
                want(predicate.meta.root_names(), Use.VALUE)
            case Dedupe(columns=key):
                want(key, Use.HASH)
        for table in node.tables:
            want(list(table.keys), Use.VALUE)
            for agg in table.aggs.values():
                if agg.column is not None and agg.kind == "count":
                    counted.add(agg.column)
                elif agg.column is not None:
                    want([agg.column], Use.HASH if agg.kind == "count_distinct" else Use.VALUE)
    # Whether there is a value shows in the hash as well.
    want([name for name in counted if name not in uses], Use.VALUE)
    return uses


class SourceProgram:
    """Runs a plan over one partition. One instance a start of the task; not shared between coroutines.

    ``dedupe_state`` holds the keyed state of each dedupe step by its name; what was committed to it is remembered
    again. ``state`` is the source's clock in the commit record, None before the first. ``sources`` is how many
    partitions, and so upstream tasks, the topic has.
    """

    def __init__(
        self,
        plan: SourcePlan,
        partition: int,
        sources: int,
        decoder: BatchDecoder,
        dedupe_state: Mapping[str, KeyedState],
        state: WatermarkState | None = None,
        *,
        make_aggregator: Callable[[TablePlan], Aggregator] = PartialAggregator,
    ) -> None:
        self._plan, self._partition, self._sources, self._decoder = plan, partition, sources, decoder
        self._clock = SourceClock(plan.event_time, state)
        self._earliest_ms, self._latest_ms = _held_times(plan)
        self._side = _Side(plan)
        self._committed = Counters()
        self._dedupes: list[DedupeOperator] = []
        self._tables: dict[str, Aggregator] = {}
        self._forwards: dict[str, Forward] = {}
        self._rules: list[tuple[str, RowExpr]] = []
        columns = dict(plan.columns)
        root = plan.root
        while len(root.children) == 1 and isinstance(step := root.children[0].step, Expect):
            root = root.children[0]
            self._rules += [(name, _judged(rule, columns, step.where)) for name, rule in step.rules.items()]
        self._root = _Branch(
            None,
            [self._branch(child, columns, dedupe_state, make_aggregator) for child in root.children],
            [self._window(table, make_aggregator) for table in root.tables],
            [self._forward(topic) for topic in root.outputs],
        )

    def process(self, batch: RawBatch) -> None:
        """Take the next records. They are done with on return; what they leave waits for `collect`."""
        side = self._side
        side.begin(batch)
        decoded = self._decoder.decode(batch)
        for bad in decoded.bad:
            side.dead(bad.row, bad.reason, bad.schema_id)
        frame = self._timed(self._expected(decoded.frame))
        if frame.height:
            self._root.run(frame, side)

    def tick(self, monotonic_ms: int, at_end: bool) -> bool:
        """Processing time has gone on: idleness. True if the watermark or the idle flag changed."""
        return self._clock.tick(monotonic_ms, at_end)

    def end(self) -> None:
        """The bounded input has ended here: every window closes."""
        self._clock.end()

    def collect(self, epoch: int) -> Collected:
        """End the epoch: dedupe ids go to their keyed state, all else is handed out and forgotten here."""
        for dedupe in self._dedupes:
            dedupe.collect(epoch)
        clock = self._clock
        partials = {
            name: table.drain(self._partition, self._sources, epoch, clock.watermark, clock.idle)
            for name, table in self._tables.items()
        }
        side, counts = self._side.take()
        self._committed.add(counts)
        taken = ((topic, forward.take()) for topic, forward in self._forwards.items())
        forwarded = {topic: parts for topic, parts in taken if parts}
        return Collected(partials, side, counts, forwarded)

    def abort(self, state: WatermarkState | None) -> None:
        """Forget everything since the last `collect`; the clock goes back to ``state``. The overlays of the dedupe
        steps have been dropped before."""
        self._side.take()
        self._clock.reset(state)
        for table in self._tables.values():
            table.drop()
        for forward in self._forwards.values():
            forward.drop()
        for dedupe in self._dedupes:
            dedupe.abort()

    def snapshot(self) -> WatermarkState:
        """The clock, for the commit record."""
        return self._clock.state()

    @property
    def watermark(self) -> int:
        return self._clock.watermark

    @property
    def counters(self) -> Counters:
        """Of all collected epochs."""
        return deepcopy(self._committed)

    @property
    def size_bytes(self) -> int:
        """Memory that the open epoch holds: side records, dedupe ids, partial aggregates and what goes on to topics."""
        held: list[Aggregator | DedupeOperator | Forward] = [
            *self._tables.values(), *self._dedupes, *self._forwards.values(),
        ]  # fmt: skip
        return self._side.size_bytes + sum(one.size_bytes for one in held)

    # --- a program from the plan's tree

    def _branch(
        self,
        node: Node,
        columns: dict[str, pl.DataType],
        states: Mapping[str, KeyedState],
        make: Callable[[TablePlan], Aggregator],
    ) -> _Branch:
        step = node.step
        run: _Step
        match step:
            case Filter(predicate, where):
                run = _FilterStep(_judged(predicate, columns, where))
            case WithColumns(derived, where):
                run = _DeriveStep({name: _judged(expr, columns, where) for name, expr in derived.items()})
                columns = columns | {name: expr.dtype for name, expr in run.columns.items()}
            case Dedupe():
                operator = DedupeOperator(step, states[step.name])
                operator.restore()
                self._dedupes.append(operator)
                run = _DedupeStep(step, operator, node.late_topics(self._plan.late_topic))
            case _:
                invariant(False, f"{step!r} cannot stand here in a plan.")
        children = [self._branch(child, columns, states, make) for child in node.children]
        tables = [self._window(table, make) for table in node.tables]
        return _Branch(run, children, tables, [self._forward(topic) for topic in node.outputs])

    def _window(self, table: TablePlan, make: Callable[[TablePlan], Aggregator]) -> _WindowStep:
        self._tables[table.name] = make(table)
        return _WindowStep(table, self._tables[table.name])

    def _forward(self, topic: str) -> Forward:
        """One for each topic, however many branches lead to it."""
        return self._forwards.setdefault(topic, Forward())

    # --- what comes before the tree

    def _expected(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Records that keep every expectation; the first rule that fails is the reason."""
        if not self._rules or not frame.height:
            return frame
        bad = np.zeros(frame.height, np.bool_)
        for (name, _), value in zip(self._rules, evaluate(frame, [rule for _, rule in self._rules]), strict=True):
            broken = (~value.value).fill_null(False).to_numpy() | _any(
                value.failed, value.overflow, value.nan, frame.height
            )
            self._side.dead_rows(frame, broken & ~bad, name)
            bad |= broken
        return _keep(frame, ~bad)

    def _timed(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Records with a usable event time, with `TIME` and `BEFORE`. They move the watermark."""
        if not frame.height:
            return frame
        spec, column = self._plan.event_time, frame[self._plan.event_time.column]
        times, faults = _event_times(column, spec, self._side.timestamps(frame))
        if int(times.min()) < self._earliest_ms or int(times.max()) > self._latest_ms:
            outside = (times < self._earliest_ms) | (times > self._latest_ms)
            faults.append((f'the window of event time "{spec.column}" is not within the years 1 to 9999', outside))
        bad = np.zeros(frame.height, np.bool_)
        for reason, fault in faults:
            self._side.dead_rows(frame, fault & ~bad, reason)
            bad |= fault
        if faults:
            frame, times = _keep(frame, ~bad), times[~bad]
        return frame.hstack([pl.Series(TIME, times), pl.Series(BEFORE, self._clock.observe(times))])


def _held_times(plan: SourcePlan) -> tuple[int, int]:
    """The first and the last event time whose windows, in all tables, begin and end within what every sink can hold."""
    earliest, latest = EARLIEST_MS, LATEST_MS
    for table in (table for node in plan.root.nodes() for table in node.tables):
        size, offset = table.window.size_ms, table.window.offset_ms
        earliest = max(earliest, EARLIEST_MS + (offset - EARLIEST_MS) % size)
        latest = min(latest, LATEST_MS - (LATEST_MS - offset) % size - 1)
    return earliest, latest


def _event_times(column: pl.Series, spec: EventTime, record_times: I64) -> tuple[I64, list[tuple[str, Mask]]]:
    """Event times in ms (anything where there is none) and, for each reason met, the records that have no usable one."""
    what = f'event time "{spec.column}"'
    faults = [(f"{what} is missing", column.is_null().to_numpy())] if column.null_count() else []
    if column.dtype.is_float():
        faults.append((f"{what} is not a number", (~column.is_finite()).fill_null(False).to_numpy()))
        # Far outside the years that count, and inside int64.
        column = column.floor().clip(-1e16, 1e16).fill_nan(None)
    factor, divisor = 1, 1
    if isinstance(column.dtype, pl.Datetime):
        divisor = {"ms": 1, "us": 1_000, "ns": 1_000_000}[column.dtype.time_unit or "us"]
    elif column.dtype == pl.Date:
        factor = 86_400_000
    whole = column.cast(physical_of(column.dtype)).cast(pl.Int64, strict=False)
    times = (whole.fill_null(0) if whole.null_count() else whole).to_numpy()
    if divisor != 1:
        times = times // divisor
    if factor != 1:
        times = times * factor
    wild = (times < EARLIEST_MS) | (times > LATEST_MS)
    ahead = times - spec.max_ahead_ms > record_times
    reasons = (
        (f"{what} is not within the years 1 to 9999", wild),
        (f"{what} is more than {spec.max_ahead_ms} ms ahead of the record's timestamp", ahead),
    )
    return times, faults + [(reason, fault) for reason, fault in reasons if fault.any()]


class _Side:
    """Dead letters and late records of the open epoch, and its counters. Looks into the batch in process."""

    def __init__(self, plan: SourcePlan) -> None:
        self._plan = plan
        self._records: list[SideRecord] = []
        self.counts = Counters()
        self.size_bytes = 0

    def begin(self, batch: RawBatch) -> None:
        self.batch = batch
        self.counts.records += len(batch)

    def timestamps(self, frame: pl.DataFrame) -> I64:
        """The records' own, by Kafka."""
        times = self.batch.timestamps
        return times if frame.height == len(times) else times[frame[ROW].to_numpy()]

    def dead_rows(self, frame: pl.DataFrame, mask: Mask, reason: str) -> None:
        if mask.any():
            for row in frame[ROW].to_numpy()[mask].tolist():
                self.dead(row, reason, None)

    def dead(self, row: int, reason: str, schema_id: int | None) -> None:
        """``schema_id`` None: taken from the value, if it has one."""
        self.counts.count_dead(reason)
        self._put("dead", self._plan.dead_letter_topic, row, reason, schema_id, ())

    def late(self, row: int, topic: str, reason: str, window: _Ours = ()) -> None:
        self._put("late", topic, row, reason, None, window)

    def take(self) -> tuple[list[SideRecord], Counters]:
        """Everything since the last call, in offset order: how the epoch was cut into batches must not show."""
        taken = sorted(self._records, key=lambda record: record.offset), self.counts
        self._records, self.counts, self.size_bytes = [], Counters(), 0
        return taken

    def _put(self, kind: _Kind, topic: str, row: int, reason: str, schema_id: int | None, more: _Ours) -> None:
        record = side_record(kind, self.batch, row, topic, reason, schema_id, more)
        held = len(record.key or b"") + len(record.value or b"")
        held += sum(len(name) + len(data or b"") for name, data in record.headers)
        self.size_bytes += held + _SIDE_OVERHEAD_BYTES
        self._records.append(record)


class _Step(Protocol):
    def run(self, frame: pl.DataFrame, side: _Side) -> pl.DataFrame:
        """The records that go on, with their columns."""


@dataclass(frozen=True)
class _Branch:
    step: _Step | None
    children: list[_Branch]
    tables: list[_WindowStep]
    outputs: list[Forward]

    def run(self, frame: pl.DataFrame, side: _Side) -> None:
        if self.step is not None:
            frame = self.step.run(frame, side)
        if not frame.height:
            return
        for child in self.children:
            child.run(frame, side)
        for table in self.tables:
            table.run(frame, side)
        for output in self.outputs:
            output.add(side.batch, frame[ROW].to_numpy())


@dataclass(frozen=True)
class _FilterStep:
    predicate: RowExpr

    def run(self, frame: pl.DataFrame, side: _Side) -> pl.DataFrame:
        (value,) = evaluate(frame, [self.predicate])
        bad = _set_aside(frame, value.failed, value.overflow, "filter", side)
        keep = (value.value.fill_null(False) if value.value.null_count() else value.value).to_numpy()
        if bad is not None:
            keep = keep & ~bad
        side.counts.filtered += frame.height - int(keep.sum()) - (0 if bad is None else int(bad.sum()))
        return _keep(frame, keep)


@dataclass(frozen=True)
class _DeriveStep:
    columns: dict[str, RowExpr]

    def run(self, frame: pl.DataFrame, side: _Side) -> pl.DataFrame:
        values = evaluate(frame, list(self.columns.values()))
        bad = np.zeros(frame.height, np.bool_)
        for name, value in zip(self.columns, values, strict=True):
            fault = _set_aside(frame, value.failed, value.overflow, f'column "{name}"', side, but=bad)
            if fault is not None:
                bad |= fault
        added = frame.with_columns(value.value.alias(name) for name, value in zip(self.columns, values, strict=True))
        return _keep(added, ~bad)


@dataclass(frozen=True)
class _DedupeStep:
    step: Dedupe
    operator: DedupeOperator
    late_topics: list[str]

    def run(self, frame: pl.DataFrame, side: _Side) -> pl.DataFrame:
        null = np.zeros(frame.height, np.bool_)
        for name in self.step.columns:
            hashed, _ = hash_names(name)
            column = frame[hashed if hashed in frame.columns else name]
            if column.null_count():
                missing = column.is_null().to_numpy()
                if self.step.nulls == "dead_letter":
                    side.dead_rows(frame, missing & ~null, f'null in dedupe key "{name}"')
                null |= missing
        keyed = _keep(frame, ~null)
        hi, lo = combine([_hashes(keyed, name) for name in self.step.columns])
        verdicts = np.full(frame.height, PASS, np.uint8)
        verdicts[~null] = self.operator.admit(hi, lo, keyed[TIME].to_numpy(), keyed[BEFORE].to_numpy())
        side.counts.duplicates += int((verdicts == DUPLICATE).sum())
        self._too_old(frame, verdicts == TOO_OLD, side)
        goes_on = verdicts == PASS
        return _keep(frame, goes_on if self.step.nulls == "pass" else goes_on & ~null)

    def _too_old(self, frame: pl.DataFrame, mask: Mask, side: _Side) -> None:
        if not mask.any():
            return
        rows = frame[ROW].to_numpy()[mask].tolist()
        for row in rows:
            for topic in self.late_topics:
                side.late(row, topic, "too old to dedupe")
        side.counts.late[self.step.name] = side.counts.late.get(self.step.name, 0) + len(rows)


@dataclass(frozen=True)
class _WindowStep:
    table: TablePlan
    aggregator: Aggregator

    def run(self, frame: pl.DataFrame, side: _Side) -> None:
        table = self.table
        frame = self._fitting(frame, side)
        if not frame.height:
            return
        starts = assign(frame[TIME].to_numpy(), table.window)
        ends, before = window_ends(starts, table.window), frame[BEFORE].to_numpy()
        late = late_mask(ends, table.allowed_lateness_ms, before)
        if not late.any():
            self.aggregator.add(frame, starts)
            return
        for at in np.flatnonzero(late).tolist():
            start, end = int(starts[at]), int(ends[at])
            window = (
                ("sp-table", table.name.encode()),
                ("sp-window-start", _text(start)),
                ("sp-window-end", _text(end)),
                ("sp-late-by-ms", _text(int(before[at]) - (end - 1 + table.allowed_lateness_ms))),
            )
            side.late(int(frame[ROW][at]), table.late_topic, "late", window)
        side.counts.late[table.name] = side.counts.late.get(table.name, 0) + int(late.sum())
        if not late.all():
            self.aggregator.add(_keep(frame, ~late), starts[~late])

    def _fitting(self, frame: pl.DataFrame, side: _Side) -> pl.DataFrame:
        """Records whose text fits the table's rows: one that does not would stop the worker when it commits."""
        names = _texts_kept(self.table)
        limit = TABLE_TEXT_BYTES_MAX // max(len(names), 1)
        for name in names:
            sizes = frame[name].str.len_bytes()
            if (sizes.max() or 0) > limit:  # type: ignore[operator]
                long = (sizes > limit).fill_null(False).to_numpy()
                side.dead_rows(frame, long, f'"{name}" is too long for table "{self.table.name}"')
                frame = _keep(frame, ~long)
        return frame


def _texts_kept(table: TablePlan) -> list[str]:
    """Columns whose text a row of the table holds."""
    keys = [name for name, dtype in table.keys.items() if dtype == pl.String]
    kept = [agg.column for agg in table.aggs.values() if agg.kind in ("min", "max") and agg.column is not None]
    return keys + [name for name in kept if table.inputs[name] == pl.String]


def _set_aside(
    frame: pl.DataFrame, failed: Mask | None, overflow: Mask | None, what: str, side: _Side, but: Mask | None = None
) -> Mask | None:
    """Dead letters for the rows whose expression has no right value, save those in ``but``: they have one already."""
    if failed is None and overflow is None:
        return None
    none = np.zeros(frame.height, np.bool_)
    broke, wrapped = none if failed is None else failed, none if overflow is None else overflow
    done = none if but is None else but
    side.dead_rows(frame, broke & ~done, f"{what} cannot be computed")
    side.dead_rows(frame, wrapped & ~broke & ~done, f"integer overflow in {what}")
    return broke | wrapped


def _hashes(frame: pl.DataFrame, name: str) -> Hashes:
    hi, lo = hash_names(name)
    return (frame[hi].to_numpy(), frame[lo].to_numpy()) if hi in frame.columns else hash_series(frame[name])


def _judged(expr: pl.Expr, columns: Mapping[str, pl.DataType], where: str) -> RowExpr:
    """The guards of an expression that `pipeline.compile` has accepted."""
    return check(expr, columns, what="expression", where=where, trial=False)


def _keep(frame: pl.DataFrame, mask: Mask) -> pl.DataFrame:
    if mask.all():
        return frame
    kept = pl.Series(mask)
    # Column by column: a frame's own filter goes through a query and its optimizer.
    return pl.DataFrame([column.filter(kept) for column in frame.get_columns()])


def _any(first: Mask | None, second: Mask | None, third: Mask | None, rows: int) -> Mask:
    found = np.zeros(rows, np.bool_)
    for mask in (first, second, third):
        if mask is not None:
            found |= mask
    return found


def _text(number: int) -> bytes:
    return str(number).encode()
