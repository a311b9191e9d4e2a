"""Values as JSON, parameters, places in a list, answers that many share."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core.clock import SystemClock
from streamproc.core.errors import BrokerUnavailable
from streamproc.web.answers import Question, Refused, encode, plain, read_time
from streamproc.web.fresh import Fresh
from streamproc.web.graph import span
from streamproc.web.rows import Place, cut_off, read_place

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.dates(),
    st.datetimes(timezones=st.just(UTC)), st.timedeltas(),
)  # fmt: skip
names = st.one_of(st.text(), st.integers(), st.tuples(st.text()))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.frozensets(scalars), st.dictionaries(names, inner)
    ),
    max_leaves=10,
)


@given(values)
@settings(max_examples=200, deadline=None)
def test_any_value_is_json_that_javascript_reads_exactly(value: Any) -> None:
    def check(number: str) -> int:
        assert abs(int(number)) <= 1 << 53
        return int(number)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(encode(plain(value)), parse_int=check, parse_constant=refuse)


def test_what_json_has_no_room_for_is_spelt_by_the_rules() -> None:
    assert plain((1 << 53) + 1) == "9007199254740993"
    assert [plain(float(text)) for text in ("nan", "inf", "-inf")] == ["NaN", "Infinity", "-Infinity"]
    assert plain(datetime(2013, 1, 1, tzinfo=UTC)) == 1_356_998_400_000
    assert plain(date(2013, 1, 1)) == "2013-01-01"
    assert plain(timedelta(seconds=1.5)) == 1_500
    assert plain(b"\x00\xff") == "AP8="
    assert plain({("a", 1): {3, 1, 2}}) == {'["a",1]': [1, 2, 3]}


@given(st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC)))
def test_times_are_read_as_they_are_written(moment: datetime) -> None:
    ms = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert read_time(moment.isoformat(), "t") == ms
    assert read_time(moment.isoformat().replace("+", " "), "t") == ms
    assert read_time(moment.replace(tzinfo=None).isoformat(), "t") == ms
    assert read_time(str(ms), "t") == ms


@pytest.mark.parametrize("text", ["", "noon", "2013-13-01", "1e5", "٣x", "9" * 40, "--1", "2013-01-01T25:00"])
def test_what_is_no_time_is_refused_by_name(text: str) -> None:
    with pytest.raises(Refused, match="start="):
        read_time(text, "start")


def test_a_parameter_is_taken_once_and_the_rest_was_misspelt() -> None:
    question = Question([("limit", "5"), ("colum", "x")])
    assert question.count("limit", 10, 3) == 3
    assert question.text("column") is None
    with pytest.raises(Refused, match="Did you mean column"):
        question.done()
    with pytest.raises(Refused, match="twice"):
        Question([("a", "1"), ("a", "2")])


@pytest.mark.parametrize(
    ("ms", "text"), [(0, "0s"), (300_000, "5m"), (5_400_000, "1h 30m"), (86_400_000, "1d"), (1, "1ms")]
)
def test_durations_are_spelt_as_people_do(ms: int, text: str) -> None:
    assert span(ms) == text


places = st.builds(Place, st.integers(-(1 << 63), 1 << 63), st.binary(max_size=4))


@given(places)
def test_places_are_read_as_they_are_written(place: Place) -> None:
    assert read_place(str(place)) == place


@given(
    st.lists(st.lists(places, unique=True, max_size=12), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 7)
)
@settings(max_examples=200)
def test_pages_cut_from_several_lists_are_their_merge(lists: list[list[Place]], limit: int, most: int) -> None:
    """Each list gives up to ``most`` places behind the last and says how far it has looked, as workers do."""
    after: Place | None = None
    found: list[Place] = []
    for _ in range(200):
        rows, cuts = [], []
        for one in lists:
            rest = sorted(place for place in one if after is None or place > after)
            rows += rest[:most]
            cuts += [rest[most - 1]] if len(rest) > most else []
        rows.sort()
        page, after = cut_off(rows, rows, cuts, limit)
        found += page
        if after is None:
            break
    # The same place in two lists cannot be: a key lives in one partition. Here it may, and is then told once or more.
    assert sorted(set(found)) == sorted({place for one in lists for place in one})
    assert found == sorted(found)


def test_an_answer_is_asked_for_once_however_many_want_it_and_the_last_one_serves_while_the_broker_is_away() -> None:
    asked = 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        if asked == 2:
            raise BrokerUnavailable("gone")
        return asked

    async def scenario() -> None:
        fresh = Fresh(ask, SystemClock(), 0, age_s=0.05)
        assert await asyncio.gather(*(fresh.get() for _ in range(20))) == [1] * 20
        assert await fresh.get() == 1
        assert asked == 1
        await asyncio.sleep(0.06)
        assert await fresh.get() == 1
        assert fresh.problem == "gone"
        await asyncio.sleep(0.06)
        assert await fresh.get(patience_s=0) == 1
        await asyncio.sleep(0.02)
        assert (await fresh.get(), fresh.problem) == (3, None)

    asyncio.run(scenario())
