"""What a user writes: `app.pipeline(topic).expect(...).dedupe(...).group_by(...).window(...).agg(...).table(...)`.

Every step gives a new object, so that a pipeline can fork: what two tables share is declared, and run, once. Nothing
is checked against the schema before `compile`, which judges the whole and names the user's line.

                        to
                     ┌──────▶ a topic       ┌───────────────┐
    Declaration ──▶ Pipeline ──▶ Grouped ───┴▶ Windowed ────┴▶ Aggregated ──▶ TableHandle
                     │    ▲ expect, dedupe,           filter, with_columns │ ▲        sink, late.to
                     └────┘ filter, with_columns                           └─┘
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

import polars as pl

from streamproc.core.durations import Duration, milliseconds
from streamproc.core.errors import UserError, invariant
from streamproc.eventtime.spec import FOREVER, EventTime, Tumbling
from streamproc.operators.aggregates import check_plan, result_columns
from streamproc.operators.expressions import RowExpr, check, guarded, require_columns
from streamproc.operators.plan import Agg, Dedupe, Expect, Filter, Node, SourcePlan, Step, TablePlan, WithColumns

__all__ = [
    "Aggregated",
    "Declaration",
    "Emit",
    "Grouped",
    "LateOutput",
    "Output",
    "Pipeline",
    "SinkLike",
    "Source",
    "TableHandle",
    "TopicLike",
    "Windowed",
    "caller",
    "compile",
    "event_time",
    "tumbling",
]

Emit: TypeAlias = Literal["on_update", "on_close", "final"]
Columns: TypeAlias = Mapping[str, pl.DataType]

_PACKAGE: Final = str(Path(__file__).parents[1]) + os.sep
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_SPAN_MS_MAX: Final = 10_000 * 365 * 86_400_000
"""Longer than all the time there is: event times lie in the years 1 to 9999."""
_OURS: Final = ("window_start", "window_end")


class SinkLike(Protocol):
    """As much of a sink as a declaration needs; `streamproc.sinks` has the whole contract."""

    @property
    def name(self) -> str: ...


class TopicLike(Protocol):
    """As much of `app.topic(...)` as a declaration needs."""

    def get_topic_name(self) -> str: ...


def event_time(
    column: str,
    *,
    out_of_orderness: Duration = "0s",
    idle_after: Duration | None = None,
    idle: Literal["advance", "hold"] = "advance",
    max_ahead: Duration = "1h",
    bounded: bool = False,
) -> EventTime:
    """Where a topic's event time is: a column of times, or of milliseconds since the epoch. `EventTime` says what the
    rest means."""
    where = caller()
    if idle not in ("advance", "hold"):
        raise UserError(f"idle={idle!r} is not known.", remedy='Write idle="advance" or idle="hold".', where=where)
    return EventTime(
        column,
        _span(out_of_orderness, setting="out_of_orderness", where=where),
        None if idle_after is None else _span(idle_after, setting="idle_after", where=where),
        idle,
        _span(max_ahead, setting="max_ahead", where=where),
        bounded,
    )


def tumbling(size: Duration, offset: Duration = "0s") -> Tumbling:
    """Windows of ``size`` side by side, the boundaries ``offset`` after a multiple of it since 1970-01-01 UTC."""
    where = caller()
    size_ms = _positive(size, "size", where)
    offset_ms = _span(offset, setting="offset", where=where)
    if offset_ms >= size_ms:
        raise UserError(
            f"offset={offset!r} is not below size={size!r}.", remedy="Give what is left of it.", where=where
        )
    return Tumbling(size_ms, offset_ms)


@dataclass(eq=False)
class Declaration:
    """All pipelines and tables of one app, in the order they were declared; `compile` takes it."""

    sources: list[Source] = field(default_factory=list)
    tables: list[TableHandle] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    def pipeline(
        self, name: str, *, topic: str, columns: Columns, event_time: EventTime | None, schema: Any = None
    ) -> Pipeline:
        """Begin a pipeline over ``topic``. ``name`` is its identity in the commit record; ``columns`` are the types of
        the reader's schema. Called by `app.pipeline(topic)`."""
        where = caller()
        _require_topic_name(topic, "topic", where)
        _require_topic_name(name, "pipeline name", where)
        for other in self.sources:
            if other.name == name:
                raise UserError(
                    f"There are two pipelines {name!r}, the other at {other.where}.",
                    remedy='Fork the one that is there, or give this one a name: app.pipeline(topic, name="...").',
                    where=where,
                )
        if event_time is None:
            raise UserError(
                f"Topic {topic!r} has no event time.",
                remedy='Declare it: app.topic(..., event_time=sp.event_time("created_at", out_of_orderness="10m")).',
                where=where,
            )
        source = Source(self, name, topic, columns, event_time, schema, where)
        self.sources.append(source)
        return Pipeline(source)


@dataclass(frozen=True, eq=False)
class Source:
    """What a pipeline reads."""

    declaration: Declaration
    name: str
    topic: str
    columns: Columns
    event_time: EventTime
    schema: Any
    where: str


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A stream of records with its columns. Steps run in the order written; each returns a new pipeline."""

    source: Source
    step: Step | None = None
    parent: Pipeline | None = None

    def expect(self, rules: Mapping[str, pl.Expr], *, on_fail: Literal["dead_letter"] = "dead_letter") -> Pipeline:
        """A record for which a rule is false, or in which it meets NaN, becomes a dead letter with the rule's name as
        its reason (the first in order). Null passes: say ``is_not_null()`` where it may not. Comes before all other
        steps, so that a record that fails moves no watermark."""
        where = caller()
        if on_fail != "dead_letter":
            raise UserError(
                f"on_fail={on_fail!r} is not known.",
                remedy='Write on_fail="dead_letter", or use filter().',
                where=where,
            )
        if any(not isinstance(step, Expect) for step in self._steps()):
            raise UserError(
                "expect comes after other steps.", remedy="Put it right behind app.pipeline(...).", where=where
            )
        if not rules or not isinstance(rules, Mapping):
            raise UserError("expect has no rules.", remedy='Write expect({"name": expression}).', where=where)
        for name in rules:
            if not isinstance(name, str) or not name.strip() or len(name) > 200:
                raise UserError(
                    f"{name!r} is not the name of a rule.", remedy="Give it 1 to 200 characters.", where=where
                )
            if any(name in step.rules for step in self._steps() if isinstance(step, Expect)):
                raise UserError(f"There are two rules {name!r}.", remedy="Rename one of them.", where=where)
        return self._then(Expect(dict(rules), where))

    def dedupe(
        self,
        key: str | Sequence[str],
        *more: str,
        within: Duration,
        nulls: Literal["dead_letter", "pass"] = "dead_letter",
    ) -> Pipeline:
        """Only the first record of a key goes on, in offset order, while the key is remembered: ``within`` of event
        time. A null in the key is a dead letter unless ``nulls="pass"``, which lets the record pass unchecked."""
        where = caller()
        columns = _columns(key, more, "dedupe", where)
        if nulls not in ("dead_letter", "pass"):
            raise UserError(f"nulls={nulls!r} is not known.", remedy='Write "dead_letter" or "pass".', where=where)
        return self._then(Dedupe("", columns, _positive(within, "within", where), nulls, where))

    def filter(self, predicate: pl.Expr) -> Pipeline:
        """Only records for which ``predicate`` is true go on; null is not true, as in SQL."""
        return self._then(Filter(predicate, caller()))

    def with_columns(self, **columns: pl.Expr) -> Pipeline:
        """Add columns. All see the stream as it was before this step; none may take a name that is there. A record
        whose value overflows or cannot be computed becomes a dead letter."""
        return self._then(_derived(columns, caller()))

    def group_by(self, key: str | Sequence[str], *more: str) -> Grouped:
        """The keys of a table. Null is a key like any other."""
        where = caller()
        return Grouped(self, _columns(key, more, "group_by", where), where)

    def to(self, topic: str | TopicLike) -> None:
        """Send the records that come out here on to ``topic``, in the epoch's transaction: key, value, headers and timestamp as
        they came, in the partition of the same number (so the topic has as many as the source, and is made so if it is
        missing) and in the same order. The value's schema is the one it was written with."""
        where = caller()
        name = _topic_name(topic, "topic to write to", where)
        if name == self.source.topic:
            raise UserError(
                f"Records of {name!r} would go back to their own source.", remedy="Choose another topic.", where=where
            )
        schema = getattr(topic, "value_schema", None)
        if schema is not None and schema.parsed != self.source.schema.parsed:
            raise UserError(
                f"Topic {name!r} is declared with {schema.source}, but the records of {self.source.topic!r} are written to "
                f"it as they came, with {self.source.schema.source}.",
                remedy="Declare it with the same schema; to write other values, send them from an agent.",
                where=where,
            )
        if idle := self._read_by_nobody():
            raise UserError(
                f"Column {idle!r} would get lost: records are written to {name!r} as they came.",
                remedy="Leave it out, or send the records from an agent.",
                where=where,
            )
        outputs = self.source.declaration.outputs
        if any(other.stream is self and other.topic == name for other in outputs):
            raise UserError(f"These records go to {name!r} already.", remedy="Leave one of them out.", where=where)
        outputs.append(Output(name, self))

    def _read_by_nobody(self) -> str | None:
        """A derived column that no step behind it reads."""
        read: set[str] = set()
        for pipe in reversed(self.path()):
            match pipe.step:
                case WithColumns(columns):
                    if unread := [name for name in columns if name not in read]:
                        return unread[0]
                    read.update(name for expr in columns.values() for name in expr.meta.root_names())
                case Filter(predicate):
                    read.update(predicate.meta.root_names())
                case Dedupe(columns=key):
                    read.update(key)
        return None

    def _then(self, step: Step) -> Pipeline:
        return Pipeline(self.source, step, self)

    def path(self) -> list[Pipeline]:
        """From the pipeline as it was begun to this one, one for each step."""
        before = self.parent.path() if self.parent else []
        return [*before, self]

    def _steps(self) -> Iterator[Step]:
        return (pipe.step for pipe in self.path() if pipe.step is not None)


@dataclass(frozen=True, eq=False)
class Output:
    """Records of a pipeline that go on to a topic."""

    topic: str
    stream: Pipeline


@dataclass(frozen=True, eq=False)
class Grouped:
    """Keys without a window yet."""

    stream: Pipeline
    keys: tuple[str, ...]
    where: str

    def window(self, window: Tumbling, *, allowed_lateness: Duration = "0s", retain: Duration = "7d") -> Windowed:
        """Cut event time into windows. A record counts until the watermark is ``allowed_lateness`` past its window's
        end, then it goes to the late output; rows stay queryable for ``retain`` after that."""
        where = caller()
        if not isinstance(window, Tumbling):
            raise UserError(f"{window!r} is not a window.", remedy='Write window(sp.tumbling("1h")).', where=where)
        lateness_ms = _span(allowed_lateness, setting="allowed_lateness", where=where)
        return Windowed(self, window, lateness_ms, _span(retain, setting="retain", where=where), where)

    def agg(self, **aggs: Agg) -> Aggregated:
        """One row a key, for ever: the one window, `FOREVER`, is that of all time. It never closes, so nothing is late for it
        and nothing leaves it."""
        return Windowed(self, FOREVER, 0, 0, caller()).agg(**aggs)


@dataclass(frozen=True, eq=False)
class Windowed:
    """Keys and windows without aggregates yet."""

    grouped: Grouped
    window: Tumbling
    allowed_lateness_ms: int
    retain_ms: int
    where: str

    def agg(self, **aggs: Agg) -> Aggregated:
        """The columns of the table: ``agg(orders=sp.count(), revenue=sp.sum("amount"))``."""
        where = caller()
        if not aggs:
            raise UserError("agg has no aggregates.", remedy="Write for example agg(rows=sp.count()).", where=where)
        for name, agg in aggs.items():
            _require_column_name(name, where)
            if not isinstance(agg, Agg):
                raise UserError(
                    f"{name}={agg!r} is not an aggregate.",
                    remedy='Use sp.count(), sp.sum("column") and so on.',
                    where=where,
                )
        return Aggregated(self, dict(aggs), (), where)


@dataclass(frozen=True, eq=False)
class Aggregated:
    """Rows of a table to be: keys, ``window_start``, ``window_end``, aggregates, derived columns."""

    windowed: Windowed
    aggs: Mapping[str, Agg]
    post: tuple[Filter | WithColumns, ...]
    where: str

    def filter(self, predicate: pl.Expr) -> Aggregated:
        """Show only rows for which ``predicate`` is true (SQL's HAVING). The others stay in the state, and may yet
        come to be shown."""
        return replace(self, post=(*self.post, Filter(predicate, caller())))

    def with_columns(self, **columns: pl.Expr) -> Aggregated:
        """Derived columns of the result, computed when a row is read or sunk. A whole number that overflows is null."""
        return replace(self, post=(*self.post, _derived(columns, caller())))

    def table(self, name: str) -> TableHandle:
        """Keep the rows as the table ``name``: its identity in topics, stores and sinks."""
        where = caller()
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{name!r} cannot name a table.",
                remedy="Use letters, digits and _, at most 63, no digit first: topics and Postgres tables take it too.",
                where=where,
            )
        declaration = self.windowed.grouped.stream.source.declaration
        for other in declaration.tables:
            if other.name.lower() == name.lower():
                raise UserError(
                    f"There are two tables {name!r}, the other at {other.where}.",
                    remedy="Rename one of them.",
                    where=where,
                )
        handle = TableHandle(name, self, where)
        declaration.tables.append(handle)
        return handle


class TableHandle:
    """A declared table: what the app queries, sinks and reads late records of."""

    def __init__(self, name: str, rows: Aggregated, where: str) -> None:
        self.name, self.rows, self.where = name, rows, where
        self.sinks: list[tuple[Any, Emit]] = []
        """`streamproc.sinks` sinks, each with what it is sent."""
        self.late = LateOutput(self)
        self.compiled: TablePlan | None = None

    @property
    def stream(self) -> Pipeline:
        """The stream that the table aggregates."""
        return self.rows.windowed.grouped.stream

    @property
    def plan(self) -> TablePlan:
        """There after `compile`."""
        invariant(self.compiled is not None, f"Table {self.name!r} was used before its plan was compiled.")
        assert self.compiled is not None  # said above; this one tells the type checker
        return self.compiled

    def sink(self, *sinks: SinkLike, emit: Emit = "on_update") -> TableHandle:
        """Write the table's committed rows to ``sinks``: at each epoch that changed them (``on_update``), once their
        window is closed and at each later change (``on_close``), or once (``final``)."""
        where = caller()
        if emit not in get_args(Emit):
            raise UserError(
                f"emit={emit!r} is not known.", remedy=f"Use one of {', '.join(get_args(Emit))}.", where=where
            )
        if self.rows.windowed.window == FOREVER and emit != "on_update" and not self.stream.source.event_time.bounded:
            raise UserError(
                f"emit={emit!r} would send nothing: table {self.name!r} has no window that closes.",
                remedy='Use emit="on_update", or give the table a window.',
                where=where,
            )
        for sink in sinks:
            if any(other.name == sink.name for other, _ in self.sinks):
                raise UserError(
                    f"Table {self.name!r} has the sink {sink.name!r} twice.",
                    remedy="Leave one of them out.",
                    where=where,
                )
            self.sinks.append((sink, emit))
        return self


class LateOutput:
    """A table's late records: a real stream, in the pipeline's own late topic unless `to` names another."""

    def __init__(self, table: TableHandle) -> None:
        self._table = table
        self.topic: str | None = None
        """None: the pipeline's own."""

    def to(self, topic: str | TopicLike) -> None:
        """Send the table's late records to ``topic``."""
        where = caller()
        name = _topic_name(topic, "late topic", where)
        if name == self._table.stream.source.topic:
            raise UserError(
                f"Late records of {self._table.name!r} would go back to their own source {name!r}.",
                remedy="Choose another topic.",
                where=where,
            )
        self.topic = name


def caller() -> str:
    """``file:line`` of the nearest frame that is not streamproc's own: the user's step."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _topic_name(topic: str | TopicLike, what: str, where: str) -> str:
    """The name of a topic that is written to."""
    name = topic if isinstance(topic, str) else topic.get_topic_name()
    _require_topic_name(name, what, where)
    return name


def _require_topic_name(name: object, what: str, where: str | None) -> None:
    """Raise `UserError` unless Kafka accepts ``name``."""
    if not isinstance(name, str) or not _TOPIC.fullmatch(name) or name in (".", ".."):
        raise UserError(
            f"{name!r} cannot be a {what}.", remedy="Use letters, digits, '.', '_' and '-', at most 249.", where=where
        )


def _require_column_name(name: str, where: str) -> None:
    """Raise `UserError` if ``name`` is ours, or no name for a column in a sink."""
    if name in _OURS or name.startswith("__"):
        raise UserError(f"A column cannot be named {name!r}: streamproc uses it.", remedy="Rename it.", where=where)
    if name == "*" or (name.startswith("^") and name.endswith("$")):
        raise UserError(
            f"A column cannot be named {name!r}: Polars reads that as a pattern.", remedy="Rename it.", where=where
        )
    if not name or len(name.encode()) > 63 or "\x00" in name:
        raise UserError(
            f"A column cannot be named {name!r}.", remedy="Use 1 to 63 bytes (Postgres's limit).", where=where
        )


def _derived(columns: Mapping[str, pl.Expr], where: str) -> WithColumns:
    if not columns:
        raise UserError("with_columns has no columns.", remedy='Write with_columns(name=pl.col("x") * 2).', where=where)
    for name in columns:
        _require_column_name(name, where)
    return WithColumns(dict(columns), where)


def _columns(first: str | Sequence[str], more: tuple[str, ...], what: str, where: str) -> tuple[str, ...]:
    columns = ((first,) if isinstance(first, str) else tuple(first)) + more
    if not columns or not all(isinstance(column, str) for column in columns):
        raise UserError(f"{what} has no column names.", remedy=f'Write {what}("column", ...).', where=where)
    for column in columns:
        if columns.count(column) > 1:
            raise UserError(f"{what} names {column!r} twice.", remedy="Leave one out.", where=where)
    return columns


def _span(duration: Duration, *, setting: str, where: str) -> int:
    """``duration`` in milliseconds, short enough to be added to any event time within int64."""
    value = milliseconds(duration, setting=setting, where=where)
    if value > _SPAN_MS_MAX:
        raise UserError(
            f"{setting}={duration!r} is more than 10,000 years.", remedy='Give less, for example "3650d".', where=where
        )
    return value


def _positive(duration: Duration, setting: str, where: str) -> int:
    value = _span(duration, setting=setting, where=where)
    if value == 0:
        raise UserError(f"{setting}={duration!r} is zero.", remedy="Give at least 1ms.", where=where)
    return value


# --- the check before the first record --------------------------------------------------------------------------------


def compile(declaration: Declaration, partitions: Mapping[str, int], app_id: str) -> list[SourcePlan]:
    """Check everything that was declared and return a plan for each pipeline; sets each table's ``plan``.

    ``partitions`` says how many every topic has that a pipeline reads; a table has as many as its source. Called once,
    before any record is read. Raises `UserError` at the first thing that cannot work. Steps that lead
    nowhere are left out.
    """
    return [_Compiler(source, partitions, app_id).plan() for source in declaration.sources]


class _Compiler:
    """Checks one pipeline from its source to its tables and topics, each shared step once."""

    def __init__(self, source: Source, partitions: Mapping[str, int], app_id: str) -> None:
        self._source, self._app_id = source, app_id
        if source.topic not in partitions:
            raise UserError(
                f"Topic {source.topic!r} does not exist.",
                remedy="Create it: `streamproc topics MODULE --create --partitions N`.",
                where=source.where,
            )
        self._partitions = partitions[source.topic]
        self._nodes: dict[Pipeline, tuple[Node, dict[str, pl.DataType]]] = {}
        self._dedupes: list[str] = []
        self._late_topic = f"{app_id}-{source.name}-late"

    def plan(self) -> SourcePlan:
        source = self._source
        self._check_event_time()
        tables = [table for table in source.declaration.tables if table.stream.source is source]
        outputs = [output for output in source.declaration.outputs if output.stream.source is source]
        if not tables and not outputs:
            raise UserError(
                f"Pipeline {source.name!r} leads to no table and no topic.",
                remedy='End it with group_by(...).window(...).agg(...).table("name") or to("topic"), or remove it.',
                where=source.where,
            )
        root = Node(None)
        for table in tables:
            node, columns = self._walk(root, table.stream)
            table.compiled = self._table(table, columns)
            node.tables.append(table.compiled)
        for output in outputs:
            node, _ = self._walk(root, output.stream)
            node.outputs.append(output.topic)
        _require_expectations_first(root)
        dead = f"{self._app_id}-{source.name}-dead-letters"
        _require_topic_name(dead, "dead letter topic (app id and pipeline name)", source.where)
        return SourcePlan(
            source.name, source.topic, source.schema, source.event_time, root, dead, self._late_topic, source.where,
            dict(source.columns),
        )  # fmt: skip

    def _check_event_time(self) -> None:
        source, column = self._source, self._source.event_time.column
        require_columns([column], source.columns, what=f"event time of topic {source.topic!r}", where=source.where)
        dtype = source.columns[column]
        if not (dtype.is_integer() or dtype.is_float() or dtype == pl.Date or isinstance(dtype, pl.Datetime)):
            raise UserError(
                f"Event time {column!r} of topic {source.topic!r} is {dtype}.",
                remedy="Use a column of times, or of milliseconds since the epoch.",
                where=source.where,
            )

    def _walk(self, root: Node, stream: Pipeline) -> tuple[Node, dict[str, pl.DataType]]:
        """The node behind which ``stream``'s records come out, and its columns."""
        node, columns = root, dict(self._source.columns)
        for pipe in stream.path():
            if pipe.step is None:
                continue
            if pipe not in self._nodes:
                step, after = self._step(pipe.step, columns)
                self._nodes[pipe] = (Node(step), after)
                node.children.append(self._nodes[pipe][0])
            node, columns = self._nodes[pipe]
        return node, columns

    def _step(self, step: Step, columns: dict[str, pl.DataType]) -> tuple[Step, dict[str, pl.DataType]]:
        """The step as it will run, and the columns behind it."""
        match step:
            case Expect(rules, where):
                for name, rule in rules.items():
                    _boolean(
                        check(rule, columns, what=f"expectation {name!r}", where=where), f"expectation {name!r}", where
                    )
            case Filter(predicate, where):
                _boolean(check(predicate, columns, what="filter", where=where), "filter", where)
            case Dedupe(columns=key, where=where):
                require_columns(key, columns, what="dedupe", where=where)
                _require_hashable(key, columns, where)
                return replace(step, name=self._dedupe_name(key)), columns
            case WithColumns(derived, where):
                return step, columns | {
                    name: _fresh(name, columns, check(expr, columns, what=f"column {name!r}", where=where), where)
                    for name, expr in derived.items()
                }
        return step, columns

    def _dedupe_name(self, key: tuple[str, ...]) -> str:
        """Stable while the key is: the name of its state and changelog."""
        base = f"{self._source.name}-dedupe-{'-'.join(key)}"[:150]
        self._dedupes.append(base)
        count = self._dedupes.count(base)
        return base if count == 1 else f"{base}-{count}"

    def _table(self, table: TableHandle, columns: dict[str, pl.DataType]) -> TablePlan:
        windowed, aggs = table.rows.windowed, table.rows.aggs
        grouped = windowed.grouped
        require_columns(grouped.keys, columns, what="group_by", where=grouped.where)
        for name in grouped.keys:
            _require_column_name(name, grouped.where)
        inputs = [agg.column for agg in aggs.values() if agg.column is not None]
        require_columns(inputs, columns, what="agg", where=table.rows.where)
        for name in aggs:
            if name in grouped.keys:
                raise UserError(
                    f"{name!r} is a group key already.", remedy="Rename the aggregate.", where=table.rows.where
                )
        plan = TablePlan(
            name=table.name,
            keys={name: columns[name] for name in grouped.keys},
            window=windowed.window,
            allowed_lateness_ms=windowed.allowed_lateness_ms,
            retain_ms=windowed.retain_ms,
            aggs=dict(aggs),
            inputs={name: columns[name] for name in inputs},
            post=(),
            partitions=self._partitions,
            late_topic=table.late.topic or self._late_topic,
            where=table.rows.where,
        )
        check_plan(plan)
        return replace(plan, post=_post(plan, table.rows.post))


def _post(plan: TablePlan, steps: tuple[Filter | WithColumns, ...]) -> tuple[Filter | WithColumns, ...]:
    """The steps behind an aggregation, checked. They may not fail on any row: a result cannot be put aside."""
    bound = pl.Datetime("ms", "UTC")
    columns = {**plan.keys, "window_start": bound, "window_end": bound, **result_columns(plan)}
    found: list[Filter | WithColumns] = []
    for step in steps:
        if isinstance(step, Filter):
            checked = check(step.predicate, columns, what="filter", where=step.where, total=True)
            _boolean(checked, "filter", step.where)
            found.append(Filter(guarded(checked), step.where))
            continue
        derived = {
            name: check(expr, columns, what=f"column {name!r}", where=step.where, total=True)
            for name, expr in step.columns.items()
        }
        found.append(WithColumns({name: guarded(checked) for name, checked in derived.items()}, step.where))
        columns = columns | {name: _fresh(name, columns, checked, step.where) for name, checked in derived.items()}
    return tuple(found)


def _require_expectations_first(root: Node) -> None:
    """Expectations decide which records move the watermark, so all branches must share them."""
    node = root
    while any(isinstance(child.step, Expect) for child in node.children):
        if len(node.children) > 1 or node.tables or node.outputs:
            step = next(child.step for child in node.children if isinstance(child.step, Expect))
            raise UserError(
                "The pipeline forks before this expect, and its branches would disagree about event time.",
                remedy="Put every expect before the fork, or use filter() in the branch.",
                where=step.where,
            )
        node = node.children[0]


def _require_hashable(key: tuple[str, ...], columns: Columns, where: str) -> None:
    for name in key:
        dtype = columns[name]
        if dtype.is_nested() or dtype.is_decimal() or dtype in (pl.Object, pl.Null):
            raise UserError(
                f"dedupe: column {name!r} is {dtype}.",
                remedy="Use text, bytes, numbers, booleans, dates or times.",
                where=where,
            )


def _boolean(checked: RowExpr, what: str, where: str) -> None:
    if checked.dtype != pl.Boolean:
        raise UserError(f"{what} is {checked.dtype}, not Boolean.", remedy="Compare it with something.", where=where)


def _fresh(name: str, columns: Columns, checked: RowExpr, where: str) -> pl.DataType:
    if name in columns:
        raise UserError(
            f"There is a column {name!r} already.", remedy="Give the derived column another name.", where=where
        )
    if checked.dtype == pl.Null or checked.dtype.is_nested():
        raise UserError(
            f"Column {name!r} is {checked.dtype}.",
            remedy="Cast it to a number, text, boolean, date or time.",
            where=where,
        )
    return checked.dtype
