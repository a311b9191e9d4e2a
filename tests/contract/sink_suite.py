"""What every sink must do, whatever is behind it.

A binding is a test module of a few lines:

    pytest.register_assert_rewrite("contract.sink_suite")
    from contract.sink_suite import SinkContract, SinkPlace

    @pytest.fixture(scope="module")
    def place() -> Iterator[SinkPlace]: ...

    class TestMine(SinkContract): ...

Table names are unique per test, so that all tests of a binding share one server.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Protocol

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamproc.commit.ledger import CatchUp, Ledger, UpToDate, decide_claim
from streamproc.core.errors import InvariantBroken, LedgerMoved, SinkUnavailable, UserError
from streamproc.sinks.contract import Sink, SinkRows, SinkWriter, TableShape

Identity = tuple[object, ...]
Row = dict[str, object]
"""What the suite compares: Python values; times in ms, dates as dates, a null as None."""

HOUR_MS = 3_600_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
_numbers = itertools.count()


class Flaky(Protocol):
    """A sink on the place's target, over a connection that can be broken."""

    sink: Sink

    def break_midway(self) -> None:
        """The next large apply loses its connection half-way, and the target stays out of reach."""

    def mend(self) -> None: ...


class SinkPlace(Protocol):
    """A target, with ways to look into it and to break it that do not go through the sink."""

    def sink(self) -> Sink: ...

    def wrong(self) -> Sequence[Callable[[], Sink]]:
        """Sinks whose target can never hold a table; made or opened, each is a `UserError`."""

    async def rows(self, shape: TableShape) -> dict[Identity, Row]:
        """All rows of a table, of all partitions: identity (keys, window_start in ms) to window_end and the
        aggregates."""

    def flaky(self) -> AbstractAsyncContextManager[Flaky]: ...

    def kill(self) -> None: ...

    def restart(self) -> None: ...


def shape_of(
    keys: Mapping[str, pl.DataType] | None = None, columns: Mapping[str, pl.DataType] | None = None
) -> TableShape:
    """A table of its own name."""
    return TableShape(
        f"suite_{next(_numbers)}",
        dict(keys if keys is not None else {"country": pl.String()}),
        dict(columns if columns is not None else {"orders": pl.Int64(), "revenue": pl.Float64()}),
        partitions=4,
    )


def upserts(shape: TableShape, rows: Mapping[Identity, Sequence[object]]) -> pl.DataFrame:
    """Rows by identity; windows are an hour wide."""
    times = {"window_start": pl.Datetime("ms", "UTC"), "window_end": pl.Datetime("ms", "UTC")}
    types = {name: ({**shape.keys, **shape.columns, **times})[name] for name in shape.names}
    data = [(*key[:-1], time_of(key[-1]), time_of(key[-1]) + timedelta(hours=1), *row) for key, row in rows.items()]
    return pl.DataFrame(data, schema=types, orient="row")


def deletes(shape: TableShape, rows: Collection[Identity]) -> pl.DataFrame:
    types = {**shape.keys, "window_start": pl.Datetime("ms", "UTC")}
    return pl.DataFrame([(*row[:-1], time_of(row[-1])) for row in rows], schema=types, orient="row")


def time_of(ms: object) -> datetime:
    assert isinstance(ms, int)
    return EPOCH + timedelta(milliseconds=ms)


def changed(shape: TableShape, new: Mapping[Identity, Sequence[object]], gone: Collection[Identity] = ()) -> SinkRows:
    return SinkRows(upserts(shape, new), deletes(shape, gone))


def expected(shape: TableShape, rows: Mapping[Identity, Sequence[object]]) -> dict[Identity, Row]:
    """The same rows as a place reads them back."""
    return {
        key: {"window_end": _ms(key[-1]) + HOUR_MS}
        | {name: _plain(value) for name, value in zip(shape.columns, row, strict=True)}
        for key, row in rows.items()
    }


def _ms(value: object) -> int:
    assert isinstance(value, int)
    return value


def _plain(value: object) -> object:
    return (value - EPOCH) // timedelta(milliseconds=1) if isinstance(value, datetime) else value


@asynccontextmanager
async def opened(sink: Sink, shape: TableShape, partition: int = 0) -> AsyncIterator[SinkWriter]:
    writer = sink.writer(shape, "suite", partition)
    await writer.open()
    try:
        yield writer
    finally:
        await writer.close()


def at(epoch: int, *, incarnation: int = 1, log_id: str = "log", hint: int = 0) -> Ledger:
    return Ledger(log_id, incarnation, epoch, hint)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(within())


class SinkContract:
    """Mixed into a test class; the binding gives the fixture ``place``."""

    def test_a_new_target_has_no_ledger_and_keeps_the_one_it_gets(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            async with opened(place.sink(), shape) as writer:
                assert await writer.read() is None
                await writer.apply(None, held=None, moved=at(0, hint=5))
                assert await writer.read() == at(0, hint=5)
            async with opened(place.sink(), shape) as again:
                assert await again.read() == at(0, hint=5)
                await again.open()
                assert await again.read() == at(0, hint=5)

        play(scenario)

    def test_a_forgotten_ledger_is_gone_and_the_rows_and_other_ledgers_stay(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            rows = {("DE", 0): (2, 3.5)}
            async with opened(place.sink(), shape) as writer, opened(place.sink(), shape, partition=1) as other:
                assert not await writer.forget()
                await writer.apply(changed(shape, rows), held=None, moved=at(1))
                await other.apply(None, held=None, moved=at(2))
                assert await writer.forget()
                assert await writer.read() is None
                assert await other.read() == at(2)
                assert await place.rows(shape) == expected(shape, rows)
                await writer.apply(None, held=None, moved=at(0, log_id="new"))

        play(scenario)

    def test_rows_and_ledger_move_together(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            rows = {("DE", 0): (2, 3.5), ("DE", HOUR_MS): (1, None), ("FR", 0): (7, 0.1)}
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1, hint=9))
                assert await place.rows(shape) == expected(shape, rows)
                assert await writer.read() == at(1, hint=9)

        play(scenario)

    def test_a_writer_that_holds_another_ledger_writes_nothing(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            rows: dict[Identity, Sequence[object]] = {("DE", 0): (2, 3.5)}
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1))
                for held in (None, at(0), at(2), at(1, incarnation=2), at(1, log_id="other")):
                    with pytest.raises(LedgerMoved):
                        await writer.apply(changed(shape, {("XX", 0): (0, 0.0)}, [("DE", 0)]), held=held, moved=at(3))
                    with pytest.raises(LedgerMoved):
                        await writer.apply(None, held=held, moved=at(3))
                assert await place.rows(shape) == expected(shape, rows)
                assert await writer.read() == at(1)
                await writer.apply(changed(shape, rows), held=at(1, hint=77), moved=at(2))  # hints are not compared
                assert await writer.read() == at(2)

        play(scenario)

    def test_a_claim_fences_the_older_incarnation(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            async with opened(place.sink(), shape) as old, opened(place.sink(), shape) as new:
                await old.apply(changed(shape, {("DE", 0): (1, 1.0)}), held=None, moved=at(1))
                await new.apply(None, held=await new.read(), moved=at(1, incarnation=2))
                with pytest.raises(LedgerMoved):
                    await old.apply(changed(shape, {("DE", 0): (9, 9.0)}), held=at(1), moved=at(2))
                await new.apply(
                    changed(shape, {("DE", 0): (2, 2.0)}), held=at(1, incarnation=2), moved=at(2, incarnation=2)
                )
                assert await place.rows(shape) == expected(shape, {("DE", 0): (2, 2.0)})

        play(scenario)

    @pytest.mark.parametrize("held", [None, at(1)], ids=["no ledger", "a ledger"])
    def test_of_two_claims_at_once_one_wins(self, place: SinkPlace, held: Ledger | None) -> None:
        async def scenario() -> None:
            shape = shape_of()
            async with opened(place.sink(), shape) as one, opened(place.sink(), shape) as two:
                if held is not None:
                    await one.apply(None, held=None, moved=held)
                outcomes = await asyncio.gather(
                    one.apply(changed(shape, {("one", 0): (1, 1.0)}), held=held, moved=at(2, incarnation=2)),
                    two.apply(changed(shape, {("two", 0): (2, 2.0)}), held=held, moved=at(2, incarnation=3)),
                    return_exceptions=True,
                )
                assert sorted(type(o) for o in outcomes if o is not None) == [LedgerMoved]
                found = await one.read()
                assert found is not None
                winner = {2: ("one", 0), 3: ("two", 0)}[found.incarnation]
                assert set(await place.rows(shape)) == {winner}

        play(scenario)

    def test_rows_are_absolute_and_applying_them_again_changes_nothing(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            first = {("DE", 0): (2, 3.5), ("FR", 0): (1, 1.0)}
            second: dict[Identity, Sequence[object]] = {("DE", 0): (None, 4.0)}
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, first), held=None, moved=at(1))
                for epoch in (2, 3):
                    await writer.apply(changed(shape, second), held=at(epoch - 1), moved=at(epoch))
                    assert await place.rows(shape) == expected(shape, {**first, **second})

        play(scenario)

    def test_deletes_take_out_exactly_their_rows(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of({"a": pl.String(), "b": pl.Int64()})
            names = ("x", "", None)
            rows = {(a, b, t): (1, 1.0) for a in names for b in (0, None) for t in (0, HOUR_MS)}
            gone: list[Identity] = [("x", 0, 0), (None, 0, 0), ("", None, HOUR_MS), (None, None, 0), ("absent", 0, 0)]
            new: dict[Identity, Sequence[object]] = {("x", 1, 0): (5, 5.0)}
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1))
                await writer.apply(changed(shape, new, gone), held=at(1), moved=at(2))
                left = {key: row for key, row in rows.items() if key not in gone} | new
                assert await place.rows(shape) == expected(shape, left)
                await writer.apply(changed(shape, {}, list(left)), held=at(2), moved=at(3))
                assert await place.rows(shape) == {}
                await writer.apply(changed(shape, rows), held=at(3), moved=at(4))
                assert await place.rows(shape) == expected(shape, rows)

        play(scenario)

    def test_every_type_survives_at_its_extremes(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of(
                {"flag": pl.Boolean(), "id": pl.Int64(), "day": pl.Date()},
                {
                    "i": pl.Int64(),
                    "small": pl.UInt32(),
                    "f": pl.Float64(),
                    "b": pl.Boolean(),
                    "d": pl.Date(),
                    "t": pl.Datetime("ms", "UTC"),
                    "s": pl.String(),
                },
            )
            day, time = date(2013, 1, 1), datetime(2013, 1, 1, 5, 15, 0, 123_000, UTC)
            rows: dict[Identity, Sequence[object]] = {
                (True, INT64_MIN, day, 0): (INT64_MAX, 0, 0.1, True, day, time, "x"),
                (False, INT64_MAX, day, 0): (INT64_MIN, 2**32 - 1, -0.0, False, date(1969, 12, 31), EPOCH, ""),
                (None, None, None, 0): (None, None, None, None, None, None, None),
                (True, 0, day, -HOUR_MS): (0, 1, math.inf, None, None, time - timedelta(days=30_000), " "),
                (True, 1, day, 1_357_016_400_000): (1, 1, -math.inf, None, day, None, "y"),
                (True, 2, day, 0): (1, 1, 5e-324, None, day, None, None),
                (True, 3, day, 0): (1, 1, 1.7976931348623157e308, None, day, None, None),
            }
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1))
                assert await place.rows(shape) == expected(shape, rows)

        play(scenario)

    def test_nan_stays_nan(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, {("DE", 0): (1, math.nan)}), held=None, moved=at(1))
                value = (await place.rows(shape))[("DE", 0)]["revenue"]
                assert isinstance(value, float)
                assert math.isnan(value)

        play(scenario)

    def test_text_keys_that_look_like_syntax_stay_apart(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of({"a": pl.String(), "b": pl.String()}, {"note": pl.String()})
            odd = ["", ":", "a:b", "%", "%00", "%3A", "{x}", "a,b", 'say "hi"', "\\.", "\\N", "NULL", "a\nb", "\r\n",
                   "é", "日本", "🦋", "e\u0301", " ", "'; --", "*", "[a-z]?"]  # fmt: skip
            pairs = [(a, b) for a in (*odd, None) for b in ("", ":", "%00", "b", None)]
            rows: dict[Identity, Sequence[object]] = {(a, b, 0): (f"{a}/{b}",) for a, b in pairs}
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1))
                assert await place.rows(shape) == expected(shape, rows)
                gone = list(rows)[::2]
                await writer.apply(changed(shape, {}, gone), held=at(1), moved=at(2))
                assert await place.rows(shape) == expected(shape, {k: v for k, v in rows.items() if k not in set(gone)})

        play(scenario)

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        rows=st.dictionaries(
            st.tuples(
                st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
                st.integers(-(10**13), 10**13),
            ),
            st.tuples(st.none() | st.integers(INT64_MIN, INT64_MAX), st.none() | st.floats(allow_nan=False)),
            min_size=1,
        )
    )
    def test_any_rows_are_read_back_as_written(
        self, place: SinkPlace, rows: dict[tuple[str | None, int], tuple[int | None, float | None]]
    ) -> None:
        async def scenario() -> None:
            shape = shape_of()
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1))
                assert await place.rows(shape) == expected(shape, rows)

        play(scenario)

    def test_an_apply_cut_midway_leaves_the_ledger_and_can_be_repeated(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            before = {(f"customer {n}", 0): (1, 0.5) for n in range(20_000)}
            after = {key: (2, 1.5) for key in list(before)[:19_000]}
            gone = list(before)[19_000:]
            async with (
                place.flaky() as flaky,
                opened(flaky.sink, shape) as writer,
                opened(place.sink(), shape) as other,
            ):
                await writer.apply(changed(shape, before), held=None, moved=at(1))
                flaky.break_midway()
                with pytest.raises(SinkUnavailable):
                    await writer.apply(changed(shape, after, gone), held=at(1), moved=at(2))
                with pytest.raises(SinkUnavailable):
                    await writer.read()
                flaky.mend()
                assert await other.read() == await writer.read() == at(1)
                await writer.apply(changed(shape, after, gone), held=at(1), moved=at(2))
                assert await place.rows(shape) == expected(shape, after)
                assert await writer.read() == at(2)

        play(scenario)

    def test_a_killed_target_is_unavailable_and_comes_back_as_its_ledger_says(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, {("DE", 0): (1, 1.0)}), held=None, moved=at(1))
                place.kill()
                for _ in range(2):
                    with pytest.raises(SinkUnavailable):
                        await writer.apply(changed(shape, {("DE", 0): (2, 2.0)}), held=at(1), moved=at(2))
                with pytest.raises(SinkUnavailable):
                    await place.sink().writer(shape, "suite", 1).open()
                place.restart()
                found = await _when_back(writer)
                decision = decide_claim(found, log_id="log", incarnation=2, epoch=2, expired=False)
                assert isinstance(decision, CatchUp | UpToDate)
                await writer.apply(None, held=decision.held, moved=decision.claim)
                await writer.apply(
                    changed(shape, {("DE", 0): (2, 2.0)}), held=decision.claim, moved=at(2, incarnation=2)
                )
                assert await place.rows(shape) == expected(shape, {("DE", 0): (2, 2.0)})

        play(scenario)

    def test_prune_deletes_what_is_mine_recent_and_not_live(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of({"a": pl.String(), "b": pl.Int64()})
            keys: list[tuple[str | None, int | None]] = [("x", 1), ("a:b%", 2), (None, 3), ("y", None)]
            rows = {(*key, t): (1, 1.0) for key in keys for t in (0, HOUR_MS, 2 * HOUR_MS)}
            live = {("x", 1, HOUR_MS), (None, 3, 2 * HOUR_MS)}
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1))

                def mine(key: tuple[object, ...]) -> bool:
                    return key != ("y", None)

                with pytest.raises(LedgerMoved):
                    await writer.prune(live, since_ms=HOUR_MS, mine=mine, held=at(1, incarnation=2))
                assert await place.rows(shape) == expected(shape, rows)
                assert await writer.prune(live, since_ms=HOUR_MS, mine=mine, held=at(1)) == 4
                left = {k: v for k, v in rows.items() if k[-1] == 0 or k in live or k[:2] == ("y", None)}
                assert await place.rows(shape) == expected(shape, left)
                assert await writer.prune(live, since_ms=HOUR_MS, mine=mine, held=at(1)) == 0
                assert await writer.read() == at(1)

        play(scenario)

    def test_prune_copes_with_many_rows(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of({"n": pl.Int64()})
            rows = {(n, 0): (1, 1.0) for n in range(12_000)}
            live = [(n, 0) for n in range(0, 12_000, 2)]
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, rows), held=None, moved=at(1))
                assert await writer.prune(live, since_ms=0, mine=lambda key: True, held=at(1)) == 6_000
                assert set(await place.rows(shape)) == set(live)

        play(scenario)

    def test_partitions_of_a_table_have_ledgers_of_their_own(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            async with opened(place.sink(), shape, 0) as one, opened(place.sink(), shape, 1) as two:
                await one.apply(changed(shape, {("DE", 0): (1, 1.0)}), held=None, moved=at(4))
                assert await two.read() is None
                await two.apply(changed(shape, {("FR", 0): (2, 2.0)}), held=None, moved=at(7))
                assert (await one.read(), await two.read()) == (at(4), at(7))
                assert await place.rows(shape) == expected(shape, {("DE", 0): (1, 1.0), ("FR", 0): (2, 2.0)})

        play(scenario)

    def test_a_table_without_group_keys_has_one_row_a_window(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of({})
            async with opened(place.sink(), shape) as writer:
                await writer.apply(changed(shape, {(0,): (1, 1.0), (HOUR_MS,): (2, 2.0)}), held=None, moved=at(1))
                await writer.apply(changed(shape, {(0,): (3, 3.0)}, [(HOUR_MS,)]), held=at(1), moved=at(2))
                assert await place.rows(shape) == expected(shape, {(0,): (3, 3.0)})

        play(scenario)

    def test_many_tasks_open_a_new_target_at_once(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            sinks = [place.sink() for _ in range(12)]
            writers = [sink.writer(shape, "suite", n) for n, sink in enumerate(sinks)]
            await asyncio.gather(*(writer.open() for writer in writers))
            await asyncio.gather(
                *(
                    writer.apply(changed(shape, {(f"key {n}", 0): (n, 0.0)}), held=None, moved=at(1))
                    for n, writer in enumerate(writers)
                )
            )
            assert await place.rows(shape) == expected(shape, {(f"key {n}", 0): (n, 0.0) for n in range(12)})
            for writer in writers:
                await writer.close()
                await writer.close()

        play(scenario)

    def test_rows_of_another_shape_are_refused_before_anything_is_written(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            shape = shape_of()
            other = shape_of(columns={"orders": pl.Int64()})
            async with opened(place.sink(), shape) as writer:
                with pytest.raises(InvariantBroken, match="orders"):
                    await writer.apply(changed(other, {("DE", 0): (1,)}), held=None, moved=at(1))
                assert await writer.read() is None

        play(scenario)

    def test_a_target_that_cannot_be_one_is_the_users_error(self, place: SinkPlace) -> None:
        async def scenario() -> None:
            for make in place.wrong():
                with pytest.raises(UserError) as caught:
                    await make().writer(shape_of(), "suite", 0).open()
                assert "secret" not in str(caught.value)
                assert caught.value.remedy

        play(scenario)


async def _when_back(writer: SinkWriter) -> Ledger | None:
    """A restarted server may refuse a moment longer."""
    for _ in range(50):
        try:
            return await writer.read()
        except SinkUnavailable:
            await asyncio.sleep(0.1)
    return await writer.read()
