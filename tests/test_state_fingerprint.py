"""A table's plan is kept with its rows: code that would misread them refuses to start and says what changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import polars as pl
import pytest

from streamproc.core.errors import UserError
from streamproc.eventtime.spec import Tumbling
from streamproc.operators.plan import Agg, Dedupe, Filter, TablePlan
from streamproc.state.fingerprint import ObjectTable, fingerprint, fingerprint_of, require_same

PLAN = TablePlan(
    name="revenue",
    keys={"country": pl.String(), "day": pl.Date()},
    window=Tumbling(300_000),
    allowed_lateness_ms=60_000,
    retain_ms=3_600_000,
    aggs={"orders": Agg("count"), "revenue": Agg("sum", "amount")},
    inputs={"amount": pl.Int64()},
    post=(),
    partitions=4,
    late_topic="late",
    where="agents/orders.py:12",
)
DEDUPE = Dedupe("orders_by_id", ("order_id",), 86_400_000, "pass", "agents/orders.py:9")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": {"day": pl.Date(), "country": pl.String()}}, 'keys was [["country","String"],["day","Date"]]'),
        ({"keys": {"country": pl.String(), "day": pl.Int64()}}, '["day","Int64"]'),
        ({"window": Tumbling(600_000)}, "window was"),
        ({"window": Tumbling(300_000, 5)}, "window was"),
        ({"aggs": {"orders": Agg("count"), "revenue": Agg("max", "amount")}}, 'revenue":["max","amount","Int64"]'),
        ({"aggs": {"revenue": Agg("sum", "amount"), "orders": Agg("count")}}, "aggregates_order was"),
        ({"aggs": {"orders": Agg("count")}}, "aggregates was"),
        ({"inputs": {"amount": pl.Float64()}}, '["sum","amount","Float64"]'),
        ({"partitions": 8}, "partitions was 4 and is 8"),
        ({"allowed_lateness_ms": 60_001}, "allowed_lateness_ms was 60000 and is 60001"),
    ],
)
def test_a_change_that_rows_would_not_survive_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        require_same(stored(PLAN), fingerprint_of(replace(PLAN, **change)), "agents/orders.py:12")
    message = str(refused.value)
    assert message.startswith("agents/orders.py:12: Table 'revenue' was built by other code: ")
    assert said in message
    assert message.endswith("rename the table, or give its rows up with `streamproc reset MODULE --table revenue`.")


@pytest.mark.parametrize(
    "change",
    [
        {"retain_ms": 1},
        {"where": "agents/orders.py:99"},
        {"post": (Filter(pl.col("orders") > 1, "here"),)},
        {"late_topic": "elsewhere"},
        {"allowed_lateness_ms": 0},
    ],
)
def test_a_change_that_rows_do_not_depend_on_goes_through(change: dict[str, Any]) -> None:
    require_same(stored(PLAN), fingerprint_of(replace(PLAN, **change)))


@pytest.mark.parametrize("change", [{"within_ms": 1_000}, {"columns": ("user_id",)}, {"name": "other"}])
def test_dedupe_forgets_nothing_silently(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="reset MODULE --table"):
        require_same(stored(DEDUPE), fingerprint_of(replace(DEDUPE, **change)))
    require_same(stored(DEDUPE), fingerprint_of(replace(DEDUPE, nulls="dead_letter", where="elsewhere")))


def test_a_table_of_another_kind_is_another_table() -> None:
    with pytest.raises(UserError, match='kind was "window table" and is "object table"'):
        require_same(stored(PLAN), fingerprint_of(ObjectTable("revenue", 4)))


def test_a_new_table_has_nothing_to_be_compared_with() -> None:
    require_same(None, fingerprint_of(PLAN))


def test_fingerprint_is_canonical_text() -> None:
    assert fingerprint(ObjectTable("totals", 2)) == '{"format":1,"kind":"object table","partitions":2,"table":"totals"}'
    assert fingerprint(PLAN) == fingerprint(replace(PLAN, retain_ms=5))
    assert fingerprint(PLAN) != fingerprint(replace(PLAN, partitions=5))


def test_what_defines_no_state_has_no_fingerprint() -> None:
    with pytest.raises(TypeError, match="Filter"):
        fingerprint_of(Filter(pl.col("a") > 1, "here"))


def stored(plan: object) -> dict[str, Any]:
    """As it comes back from a commit record."""
    form: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(fingerprint_of(plan)))
    return form
