"""What a user may declare, and what is refused before the first record, with the line to mend."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import polars as pl
import pytest

from streamproc.core.errors import UserError
from streamproc.eventtime.spec import FOREVER, EventTime, Tumbling
from streamproc.operators import aggregates as agg
from streamproc.operators.pipeline import (
    Aggregated,
    Declaration,
    Pipeline,
    TableHandle,
    compile,
    event_time,
    tumbling,
)
from streamproc.operators.plan import Dedupe, Expect, Filter, SourcePlan, WithColumns

COLUMNS: dict[str, pl.DataType] = {
    "id": pl.String(),
    "country": pl.String(),
    "amount": pl.Int64(),
    "price": pl.Float64(),
    "tags": pl.List(pl.String()),
    "at": pl.Datetime("ms", "UTC"),
}
HOURLY = tumbling("1h")


@dataclass(frozen=True)
class SomeSink:
    name: str


class SomeTopic:
    def get_topic_name(self) -> str:
        return "too_late"


def begin(declaration: Declaration, name: str = "orders", topic: str = "orders", **options: Any) -> Pipeline:
    spec: EventTime | None = options.get("spec", event_time("at", out_of_orderness="10m"))
    return declaration.pipeline(name, topic=topic, columns=COLUMNS, event_time=spec, schema="the schema")


def plan(declare: Callable[[Pipeline], object]) -> SourcePlan:
    declaration = Declaration()
    declare(begin(declaration))
    return compile(declaration, {"orders": 4}, "shop")[0]


def counted(stream: Pipeline) -> Aggregated:
    return stream.group_by("country").window(HOURLY).agg(orders=agg.count())


def table(stream: Pipeline, name: str = "t") -> TableHandle:
    return counted(stream).table(name)


def line() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


# --- what a plan holds ------------------------------------------------------------------------------------------------


def test_records_may_go_on_to_topics_from_anywhere_in_the_tree() -> None:
    def declare(stream: Pipeline) -> None:
        stream.to("copy")
        doubled = stream.with_columns(twice=pl.col("amount") * 2)
        doubled.filter(pl.col("twice") > 3).to(SomeTopic())
        table(doubled)

    root = plan(declare).root
    assert root.outputs == ["copy"]
    (doubled,) = root.children
    assert ([found.name for found in doubled.tables], doubled.outputs) == (["t"], [])
    assert doubled.children[0].outputs == ["too_late"]
    assert root.late_topics("own") == ["own", "shop-orders-late"]


def test_a_table_without_windows_has_one_that_holds_all_time() -> None:
    (grouped,) = [plan(lambda s: s.group_by("country").agg(n=agg.count()).table("t")).root.tables]
    assert [found.window for found in grouped] == [FOREVER]


def test_a_pipeline_becomes_a_tree_of_steps_with_its_table() -> None:
    declaration = Declaration()
    stream = (
        begin(declaration)
        .expect({"amount sane": pl.col("amount").is_between(0, 100)}, on_fail="dead_letter")
        .dedupe("id", within="24h")
        .filter(pl.col("country") != "XX")
        .with_columns(cents=pl.col("amount") * 100)
    )
    windowed = stream.group_by("country").window(
        tumbling("1h", "15m"), allowed_lateness="30m", retain=timedelta(days=1)
    )
    rows = windowed.agg(orders=agg.count(), cents=agg.sum("cents"), dearest=agg.max("price"))
    handle = rows.filter(pl.col("orders") > 3).with_columns(each=pl.col("cents") / pl.col("orders")).table("hourly")
    (source,) = compile(declaration, {"orders": 4}, "shop")

    assert (source.name, source.topic, source.schema) == ("orders", "orders", "the schema")
    assert (source.dead_letter_topic, source.late_topic) == ("shop-orders-dead-letters", "shop-orders-late")
    assert source.columns == COLUMNS
    node, kinds = source.root, []
    while node.children:
        (node,) = node.children
        kinds.append(type(node.step))
    assert kinds == [Expect, Dedupe, Filter, WithColumns]
    assert node.tables == [handle.plan]
    found = handle.plan
    assert found.keys == {"country": pl.String()}
    assert found.window == Tumbling(3_600_000, 900_000)
    assert (found.allowed_lateness_ms, found.retain_ms, found.partitions) == (1_800_000, 86_400_000, 4)
    assert found.inputs == {"cents": pl.Int64(), "price": pl.Float64()}
    assert found.late_topic == "shop-orders-late"
    assert [type(step) for step in found.post] == [Filter, WithColumns]


def test_every_step_knows_its_line_in_the_users_file() -> None:
    declaration = Declaration()
    stream = begin(declaration)
    stream = stream.filter(pl.col("amount") > 1)
    filter_line = line() - 1
    stream = (
        stream
        .dedupe("id", within="1h")
        .with_columns(
            twice=pl.col("amount") * 2,
        )
    )  # fmt: skip
    table(stream)
    (source,) = compile(declaration, {"orders": 1}, "shop")
    node, found = source.root, []
    while node.children:
        (node,) = node.children
        assert node.step is not None
        found.append(node.step.where)
    assert found == [f"{__file__}:{filter_line + offset}" for offset in (0, 4, 5)]


def test_forks_share_their_steps() -> None:
    declaration = Declaration()
    shared = begin(declaration).dedupe("id", within="1h")
    table(shared, "all")
    table(shared.filter(pl.col("amount") > 1), "dear")
    table(shared.filter(pl.col("amount") <= 1), "cheap")
    shared.filter(pl.col("amount") == 0)  # leads nowhere
    (source,) = compile(declaration, {"orders": 2}, "shop")
    (dedupe,) = source.root.children
    assert [table.name for table in dedupe.tables] == ["all"]
    assert [[table.name for table in child.tables] for child in dedupe.children] == [["dear"], ["cheap"]]


def test_a_step_does_not_change_the_pipeline_it_is_called_on() -> None:
    declaration = Declaration()
    stream = begin(declaration)
    stream.filter(pl.col("amount") > 1)
    table(stream)
    (source,) = compile(declaration, {"orders": 1}, "shop")
    assert source.root.children == []
    assert len(source.root.tables) == 1


def test_dedupe_steps_have_names_that_stay() -> None:
    def declare(stream: Pipeline) -> None:
        table(stream.dedupe("id", within="1h"), "one")
        table(stream.dedupe(["id"], within="2h"), "two")
        table(stream.dedupe(["id", "country"], within="2h", nulls="pass"), "three")

    steps = [child.step for child in plan(declare).root.children]
    names = [step.name for step in steps if isinstance(step, Dedupe)]
    assert names == ["orders-dedupe-id", "orders-dedupe-id-2", "orders-dedupe-id-country"]


def test_several_pipelines_may_read_one_topic() -> None:
    declaration = Declaration()
    table(begin(declaration), "a")
    table(begin(declaration, name="again"), "b")
    found = compile(declaration, {"orders": 3}, "shop")
    assert [(source.name, source.dead_letter_topic) for source in found] == [
        ("orders", "shop-orders-dead-letters"),
        ("again", "shop-again-dead-letters"),
    ]


def test_sinks_and_the_late_output_are_kept_with_the_table() -> None:
    declaration = Declaration()
    handle = table(begin(declaration))
    handle.sink(SomeSink("redis"), SomeSink("postgres"), emit="on_close").sink(SomeSink("files"), emit="final")
    assert [(sink.name, emit) for sink, emit in handle.sinks] == [
        ("redis", "on_close"), ("postgres", "on_close"), ("files", "final")
    ]  # fmt: skip
    handle.late.to(SomeTopic())
    compile(declaration, {"orders": 1}, "shop")
    assert handle.plan.late_topic == "too_late"


def test_a_derived_result_that_overflows_is_null() -> None:
    declaration = Declaration()
    handle = counted(begin(declaration)).with_columns(much=pl.col("orders") * (1 << 62)).table("t")
    compile(declaration, {"orders": 1}, "shop")
    (step,) = handle.plan.post
    assert isinstance(step, WithColumns)
    assert pl.DataFrame({"orders": [1, 2]}).select(**step.columns)["much"].to_list() == [1 << 62, None]


def test_event_time_and_windows_take_durations() -> None:
    spec = event_time("at", out_of_orderness="1m30s", idle_after=timedelta(seconds=5), idle="hold", bounded=True)
    assert spec == EventTime("at", 90_000, 5_000, "hold", 3_600_000, True)
    assert tumbling("1d", timedelta(hours=2)) == Tumbling(86_400_000, 7_200_000)


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[Pipeline], object], str]] = {
    "misspelt in an expectation": (
        lambda s: table(s.expect({"x": pl.col("amout") > 0})),
        r"expectation 'x': there is no column 'amout'. Did you mean 'amount'\?",
    ),
    "misspelt in a filter": (lambda s: table(s.filter(pl.col("counry") == "DE")), "Did you mean 'country'"),
    "misspelt in a derived column": (lambda s: table(s.with_columns(x=pl.col("prise"))), "Did you mean 'price'"),
    "misspelt dedupe key": (lambda s: table(s.dedupe("iid", within="1h")), "dedupe: there is no column 'iid'"),
    "misspelt group key": (
        lambda s: s.group_by("contry").window(HOURLY).agg(n=agg.count()).table("t"),
        "group_by: there is no column 'contry'. Did you mean 'country'",
    ),
    "misspelt aggregate input": (
        lambda s: s.group_by("country").window(HOURLY).agg(n=agg.sum("amounts")).table("t"),
        "agg: there is no column 'amounts'. Did you mean 'amount'",
    ),
    "misspelt in a result filter": (
        lambda s: counted(s).filter(pl.col("order") > 1).table("t"),
        "Did you mean 'orders'",
    ),
    "a column of the stream in a result": (
        lambda s: counted(s).filter(pl.col("amount") > 1).table("t"),
        "no column 'amount'",
    ),
    "a column before it is derived": (
        lambda s: table(s.filter(pl.col("x") > 1).with_columns(x=pl.col("amount") + 1)),
        "no column 'x'",
    ),
    "not boolean": (lambda s: table(s.filter(pl.col("amount") + 1)), "filter is Int64, not Boolean"),
    "rule not boolean": (lambda s: table(s.expect({"x": pl.col("id")})), "expectation 'x' is String, not Boolean"),
    "types do not fit": (lambda s: table(s.filter(pl.col("id") + 1 > 2)), "does not fit its columns"),
    "sum of text": (
        lambda s: s.group_by("country").window(HOURLY).agg(n=agg.sum("id")).table("t"),
        r"sum\('id'\): the column is String",
    ),
    "float key": (
        lambda s: s.group_by("price").window(HOURLY).agg(n=agg.count()).table("t"),
        r"group_by\('price'\): the column is F",
    ),
    "dedupe of lists": (lambda s: table(s.dedupe("tags", within="1h")), "column 'tags' is List"),
    "not row-wise": (lambda s: table(s.filter(pl.col("amount") > pl.col("amount").mean())), "mean is used"),
    "not row-wise in a result": (
        lambda s: counted(s).with_columns(x=pl.col("orders").cum_sum()).table("t"),
        "cum_sum is used",
    ),
    "raises in a result": (
        lambda s: counted(s).with_columns(x=pl.col("country").cast(pl.Int64)).table("t"),
        "raises for .*strict=False",
    ),
    "not an expression": (lambda s: table(s.filter("amount > 1")), "not an expression"),  # type: ignore[arg-type]
    "no type": (lambda s: table(s.with_columns(x=pl.lit(None))), "Column 'x' is Null"),
    "name taken": (lambda s: table(s.with_columns(amount=pl.col("amount") * 2)), "There is a column 'amount' already"),
    "result name taken": (
        lambda s: counted(s).with_columns(orders=pl.col("orders") + 1).table("t"),
        "There is a column 'orders' already",
    ),
    "aggregate named like a key": (
        lambda s: s.group_by("country").window(HOURLY).agg(country=agg.count()).table("t"),
        "'country' is a group key",
    ),
    "our names": (lambda s: table(s.with_columns(window_start=pl.lit(1))), "cannot be named 'window_start'"),
    "our prefix": (lambda s: s.group_by("id").window(HOURLY).agg(__x=agg.count()).table("t"), "cannot be named '__x'"),
    "too long for Postgres": (lambda s: table(s.with_columns(**{"x" * 64: pl.lit(1)})), "at most|63 bytes"),
    "expect too late": (
        lambda s: table(s.filter(pl.col("amount") > 0).expect({"x": pl.col("amount") > 0})),
        "expect comes after other",
    ),
    "expect in a fork": (
        lambda s: (table(s, "a"), table(s.expect({"x": pl.col("amount") > 0}), "b")),
        "forks before this expect",
    ),
    "rule twice": (
        lambda s: s.expect({"x": pl.col("amount") > 0}).expect({"x": pl.col("amount") > 1}),
        "two rules 'x'",
    ),
    "no rules": (lambda s: s.expect({}), "expect has no rules"),
    "another on_fail": (lambda s: s.expect({"x": pl.lit(True)}, on_fail="drop"), "on_fail='drop'"),  # type: ignore[arg-type]
    "another nulls": (lambda s: s.dedupe("id", within="1h", nulls="drop"), "nulls='drop'"),  # type: ignore[arg-type]
    "key twice": (lambda s: s.dedupe("id", "id", within="1h"), "dedupe names 'id' twice"),
    "within zero": (lambda s: s.dedupe("id", within="0s"), "within='0s' is zero"),
    "within no duration": (lambda s: s.dedupe("id", within="1 hour"), "within='1 hour' is not a duration"),
    "emit of a window that never closes": (
        lambda s: s.group_by("country").agg(n=agg.count()).table("t").sink(SomeSink("x"), emit="final"),
        "emit='final' would send nothing",
    ),
    "to its source": (lambda s: s.to("orders"), "'orders' would go back to their own source"),
    "to no topic": (lambda s: s.to("my orders"), "'my orders' cannot be a topic to write to"),
    "to a topic twice": (lambda s: (s.to("out"), s.to("out")), "go to 'out' already"),
    "to a topic without its column": (
        lambda s: s.with_columns(x=pl.col("amount") * 2).filter(pl.col("amount") > 1).to("out"),
        "Column 'x' would get lost",
    ),
    "expect behind an output": (
        lambda s: (s.to("out"), table(s.expect({"x": pl.col("amount") > 0}))),
        "forks before this expect",
    ),
    "no keys": (lambda s: s.group_by([]), "group_by has no column names"),
    "no aggregates": (lambda s: s.group_by("country").window(HOURLY).agg(), "agg has no aggregates"),
    "an expression as aggregate": (
        lambda s: s.group_by("country").window(HOURLY).agg(n=pl.len()),  # type: ignore[arg-type]
        "is not an aggregate",
    ),
    "not a window": (lambda s: s.group_by("country").window("1h"), "'1h' is not a window"),  # type: ignore[arg-type]
    "window of nothing": (lambda s: tumbling("0s"), "size='0s' is zero"),
    "offset beyond size": (lambda s: tumbling("1h", "1h"), "offset='1h' is not below"),
    "table twice": (lambda s: (table(s, "Same"), table(s, "same")), "two tables 'same', the other at .*:[0-9]+"),
    "bad table name": (lambda s: table(s, "by-country"), "'by-country' cannot name a table"),
    "unknown emit": (lambda s: table(s).sink(SomeSink("x"), emit="always"), "emit='always'.*on_update"),  # type: ignore[arg-type]
    "sink twice": (lambda s: table(s).sink(SomeSink("x")).sink(SomeSink("x")), "has the sink 'x' twice"),
    "late to its source": (lambda s: table(s).late.to("orders"), "back to their own source"),
    "late to no topic": (lambda s: table(s).late.to("late orders"), "'late orders' cannot be a late topic"),
    "no table": (lambda s: s.filter(pl.col("amount") > 1), "leads to no table and no topic"),
    "unknown idle": (lambda s: event_time("at", idle="never"), "idle='never'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG)
def test_is_refused_with_a_remedy_and_the_users_line(case: str) -> None:
    declare, message = WRONG[case]
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)) as error:
        plan(declare)
    assert error.value.remedy
    assert error.value.where is not None
    file, _, line = error.value.where.rpartition(":")
    assert (file, line.isdigit()) == (__file__, True)


def test_a_topic_without_event_time_is_refused() -> None:
    with pytest.raises(UserError, match=r"Topic 'orders' has no event time.*sp.event_time"):
        begin(Declaration(), spec=None)


@pytest.mark.parametrize(
    ("column", "message"), [("att", "no column 'att'. Did you mean 'at'"), ("id", "Event time 'id' .* is String")]
)
def test_an_event_time_that_cannot_be_is_refused(column: str, message: str) -> None:
    declaration = Declaration()
    table(begin(declaration, spec=event_time(column)))
    with pytest.raises(UserError, match=message):
        compile(declaration, {"orders": 1}, "shop")


def test_a_topic_that_does_not_exist_is_refused() -> None:
    declaration = Declaration()
    table(begin(declaration))
    with pytest.raises(UserError, match="Topic 'orders' does not exist"):
        compile(declaration, {}, "shop")


def test_two_pipelines_of_one_name_are_refused() -> None:
    declaration = Declaration()
    begin(declaration)
    with pytest.raises(UserError, match=r"two pipelines 'orders', the other at .*:\d+"):
        begin(declaration)
