"""The JSON of the web view, asked of the main job over real flights and held against the oracle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import polars as pl
import pytest

import streamproc as sp
from demo.data import make_feed
from demo.feed import write_feed
from demo.oracle import Expected, expect
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core import limits
from streamproc.core.types import TaskId
from streamproc.transport.contract import OutRecord
from tests.apps import log, new_app, running, until, write
from tests.web import DAYS, Client, client, flights_running, free_port, load_agent

PATH = "/api/tables/hourly"


@cache
def oracle() -> Expected:
    return expect(json.loads(json.dumps(make_feed(DAYS).injections)))


def ask_flights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, questions: Callable[[Client, Any], Awaitable[None]]
) -> None:
    app = load_agent("flights", folder, monkeypatch)

    async def scenario() -> None:
        async with flights_running(app, folder) as asking:
            await questions(asking, app)

    asyncio.run(scenario())


async def every_row(asking: Client, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """All pages of a list."""
    rows: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        answer = (await asking.get(path, **parameters, **({"after": after} if after else {}))).json
        rows += answer["rows"]
        assert answer["missing_partitions"] == []
        after = answer["next"]
    return rows


def test_a_point_query_equals_the_oracle_for_every_sort_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def questions(asking: Client, app: Any) -> None:
        for want in oracle().tables["hourly"][::97]:
            for start in (want["window_start"], iso(want["window_start"])):
                answer = await asking.get(
                    f"{PATH}/row", carrier=want["carrier"], origin=want["origin"], window_start=start
                )
                assert answer.status == 200
                assert answer.json["row"] == want
                assert answer.json["window"] == "final"
                assert answer.json["epoch"] >= answer.json["changed_in_epoch"] > 0
                assert 0 <= answer.json["commit_age_ms"] < 60_000
                task = app.runtime.tasks[TaskId("table-hourly", answer.json["partition"])]
                assert answer.json["epoch"] == task.record.epoch
        absent = (await asking.get(f"{PATH}/row", carrier="XX", origin="JFK", window_start=0)).json
        assert absent["row"] is None
        assert absent["window"] is None
        assert absent["epoch"] > 0

    ask_flights(tmp_path, monkeypatch, questions)


def iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat()


def test_pages_of_rows_are_the_whole_table_once_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def questions(asking: Client, app: Any) -> None:
        want = sorted(oracle().tables["hourly"], key=lambda row: (-row["window_start"], row["carrier"], row["origin"]))
        for limit in (1000, 333):
            rows = await every_row(asking, f"{PATH}/rows", limit=limit)
            assert [row["row"] for row in rows] == want
        # A filter leaves what fits, however many rows have to be looked at for a page of it.
        rows = await every_row(asking, f"{PATH}/rows", limit=10, q="ua jFk")
        assert [row["row"] for row in rows] == [
            row for row in want if row["carrier"] == "UA" and row["origin"] == "JFK"
        ]
        start = want[100]["window_start"]
        rows = await every_row(asking, f"{PATH}/rows", window_start=start, limit=7)
        assert [row["row"] for row in rows] == [row for row in want if row["window_start"] == start]

    ask_flights(tmp_path, monkeypatch, questions)


def test_a_page_ends_where_the_look_ends_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WEB_SCAN_ROWS_MAX", 200)

    async def questions(asking: Client, app: Any) -> None:
        first = (await asking.get(f"{PATH}/rows", q="HA", limit=1000)).json
        assert first["next"] is not None
        rows = await every_row(asking, f"{PATH}/rows", q="carrier=HA")
        assert len(rows) == sum(row["carrier"] == "HA" for row in oracle().tables["hourly"])
        windows = (await asking.get(f"{PATH}/windows", limit=400)).json
        assert 0 < len(windows["windows"]) < 400
        assert windows["reached"] == windows["windows"][-1]["window_start"]

    ask_flights(tmp_path, monkeypatch, questions)


def test_windows_add_up_to_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def questions(asking: Client, app: Any) -> None:
        rows = oracle().tables["daily"]
        answer = (await asking.get("/api/tables/daily/windows", limit=500)).json
        assert (answer["column"], answer["combined"], answer["reached"]) == ("flights", "sum", None)
        starts = sorted({row["window_start"] for row in rows}, reverse=True)
        assert [window["window_start"] for window in answer["windows"]] == starts
        for window in answer["windows"]:
            mine = [row["flights"] for row in rows if row["window_start"] == window["window_start"]]
            assert (window["rows"], window["sum"], window["max"]) == (len(mine), sum(mine), max(mine))
            assert window["state"] == "final"
        worst = (await asking.get("/api/tables/daily/windows", column="max_delay", q="UA", limit=1)).json
        mine = [row["max_delay"] for row in rows if row["carrier"] == "UA" and row["window_start"] == starts[0]]
        assert worst["combined"] == "max"
        assert worst["windows"][0]["max"] == max(delay for delay in mine if delay is not None)
        assert worst["reached"] == starts[0]
        # A mean of means is none.
        assert (await asking.get("/api/tables/daily/windows", column="mean_delay")).json["combined"] is None

    ask_flights(tmp_path, monkeypatch, questions)


def test_overview_and_tasks_tell_lag_watermark_and_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def questions(asking: Client, app: Any) -> None:
        whole = (await asking.get("/api/overview")).json
        assert whole["app"] == "flights"
        assert whole["ready"] is True
        assert {task["group"] for task in whole["tasks"]} == {"read-flights", "table-hourly", "table-daily"}
        readers = [task for task in whole["tasks"] if task["group"] == "read-flights"]
        assert sum(task["records"] for task in readers) == oracle().records
        assert sum(task["duplicates"] for task in readers) == oracle().duplicates
        assert sum(task["dead"] for task in readers) == len(oracle().dead)
        for task in whole["tasks"]:
            assert (task["lag"], task["phase"], task["restarts"], task["problem"]) == (0, "running", 0, None)
            assert (task["watermark"], task["watermark_note"]) == (None, "end of input")
            assert task["epoch"] >= 1
            assert task["commit_age_ms"] >= 0
        assert (await asking.get("/api/tasks")).json["tasks"][0].keys() == whole["tasks"][0].keys()
        labels = [node["label"] for node in whole["graph"]["nodes"]]
        assert labels == ["flights", "expect", "dedupe", "with columns", "hourly", "daily"]

    ask_flights(tmp_path, monkeypatch, questions)


def test_dead_letters_and_late_records_tell_why_but_not_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def questions(asking: Client, app: Any) -> None:
        answer = await asking.get("/api/side")
        topics = {topic["topic"]: topic for topic in answer.json["topics"]}
        assert {name: topic["kind"] for name, topic in topics.items()} == {
            "flights-flights-dead-letters": "dead letters",
            "flights-late-hourly": "late records",
            "flights-late-daily": "late records",
        }
        dead = topics["flights-flights-dead-letters"]["records"]
        assert len(dead) == limits.WEB_SIDE_RECORDS
        places = {(letter.partition, letter.offset) for letter in oracle().dead}
        assert {(record["partition"], record["offset"]) for record in dead} == places
        assert {record["topic"] for record in dead} == {"flights"}
        assert all(record["reason"] and record["value_bytes"] > 0 and record["time"] > 0 for record in dead)
        late = topics["flights-late-daily"]["records"]
        assert {(r["partition"], r["offset"], r.get("window_start")) for r in late} == {
            (r.partition, r.offset, r.window_start) for r in oracle().late["daily"]
        }
        tail = next(flight.flight.tailnum for flight in oracle().late["daily"] if flight.flight.tailnum)
        assert tail not in answer.text

    ask_flights(tmp_path, monkeypatch, questions)


WRONG = [
    ("/api/tables/hurly/rows", {}, 404, "Did you mean hourly?"),
    ("/api/tables/hourly/row", {"carier": "UA", "origin": "JFK", "window_start": 0}, 400, "Did you mean carrier"),
    ("/api/tables/hourly/row", {"carrier": "UA", "window_start": 0}, 400, "origin is missing"),
    ("/api/tables/hourly/row", {"carrier": "UA", "origin": "JFK"}, 400, "window_start is missing"),
    ("/api/tables/hourly/row", {"carrier": "UA", "origin": "JFK", "window_start": "noon"}, 400, "is not a time"),
    ("/api/tables/hourly/row", {"carrier": "UA", "origin": "JFK", "window_start": 1}, 400, "begins at 0"),
    ("/api/tables/hourly/row", {"carrier": "UA", "origin": "JFK", "window_start": "9" * 30}, 400, "is not a time"),
    ("/api/tables/hourly/row", {"null": "carier", "origin": "JFK", "window_start": 0}, 400, "Did you mean carrier"),
    ("/api/tables/hourly/rows", {"limit": "many"}, 400, "limit='many' is not a number"),
    ("/api/tables/hourly/rows", {"limit": "0"}, 400, "is not a number from 1"),
    ("/api/tables/hourly/rows", {"after": "here"}, 400, "not a place"),
    ("/api/tables/hourly/rows", {"lmit": "3"}, 400, "Did you mean limit?"),
    ("/api/tables/hourly/rows", {"q": "x" * 5_000}, 400, "5000 characters"),
    ("/api/tables/hourly/windows", {"column": "carrier"}, 400, "not a numeric column"),
    ("/api/overview", {"x": "1"}, 400, "no parameter 'x'"),
    ("/api/nothing", {}, 404, "There are /api/overview"),
    ("/streamproc/static/../views.py", {}, 404, ""),
    ("/streamproc/static/page.html", {}, 404, "no file"),
]


def test_every_mistake_is_answered_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def questions(asking: Client, app: Any) -> None:
        for path, parameters, status, message in WRONG:
            answer = await asking.get(path, **parameters)
            assert (answer.status, message in answer.text) == (status, True), (path, parameters, answer)
            assert "Traceback" not in answer.text

    ask_flights(tmp_path, monkeypatch, questions)


def test_faust_keeps_its_pages_and_browsers_are_led_to_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def questions(asking: Client, app: Any) -> None:
        assert (await asking.get("/")).json == {"status": "OK"}
        assert (await asking.get("/router/")).status == 200
        led = await asking.get("/", {"Accept": "text/html,*/*"})
        assert (led.status, led.headers["Location"]) == (302, "/streamproc/")
        page = await asking.get("/streamproc/tables/hourly")
        assert page.status == 200
        assert page.headers["Content-Security-Policy"].startswith("default-src 'self'")
        for part in page.text.split('"'):
            if part.startswith("/streamproc/static/"):
                assert (await asking.get(part)).status == 200, part
            # Works offline: nothing is asked of anybody else.
            assert not urlsplit(part).netloc, part

    ask_flights(tmp_path, monkeypatch, questions)


def test_tables_of_agents_show_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = load_agent("totals", tmp_path, monkeypatch)

    async def scenario() -> None:
        async with log(tmp_path) as transport:
            await write_feed(make_feed(DAYS), transport, quiet=True)
        path = "/api/tables/totals_by_record"
        async with running(app), client(app) as asking:
            done = oracle().records - len([letter for letter in oracle().dead if letter.value is not None])

            async def counted() -> int:
                return sum(int(row["row"]["value"]) for row in await every_row(asking, f"{path}/rows", limit=10))

            for _ in range(200):
                if await counted() == done:
                    break
                await asyncio.sleep(0.05)
            assert await counted() == done
            rows = await every_row(asking, f"{path}/rows")
            one = rows[3]["row"]
            answer = (await asking.get(f"{path}/row", key=json.dumps(one["key"]))).json
            assert (answer["row"], answer["partition"], answer["others"]) == (one, rows[3]["partition"], [])
            assert answer["epoch"] > 0
            assert (await asking.get(f"{path}/row", key="nobody")).json["row"] is None
            assert "key=JSON" in (await asking.get(f"{path}/row")).error
            assert (await asking.get(f"{path}/windows")).status == 404
            assert {row["row"]["key"][0] for row in await every_row(asking, f"{path}/rows", q="jfk")} == {"JFK"}

    asyncio.run(scenario())


def test_keys_of_every_type_are_found_and_ugly_values_told(tmp_path: Path) -> None:
    app = new_app(tmp_path, web_enabled=True, web_port=free_port())
    topic = app.topic(
        "events", value_schema="event.avsc", partitions=2, event_time=sp.event_time("at", out_of_orderness="0s")
    )
    (
        app.pipeline(topic)
        .with_columns(half=pl.col("amount").cast(pl.Int64), big=pl.col("amount") > 10, day=pl.col("at").dt.date())
        .group_by("country", "half", "big", "day")
        .window(sp.tumbling("1h"))
        .agg(n=sp.count(), total=sp.sum("amount"), most=sp.sum("half"))
        .table("typed")
    )

    async def scenario() -> None:
        encoder = Encoder(load_schema(tmp_path / "schemas" / "event.avsc"), 1)
        nasty = '<script>alert("1")</script> & ünï'
        values = [
            {"id": "1", "country": nasty, "amount": 12.5, "at": 3_600_000},
            {"id": "2", "country": "", "amount": float(1 << 60), "at": 3_600_001},
        ]
        records = [OutRecord(b"k", encoder.encode(value), (), 3_700_000) for value in values]
        await write(tmp_path, "events", 2, [(0, record) for record in records])
        async with running(app), client(app) as asking:
            await until(lambda: app.runtime.counts().get("events") == 2, "both records")
            shown: list[Any] = []
            while len(shown) < 2:
                shown = await every_row(asking, "/api/tables/typed/rows")
                await asyncio.sleep(0.02)
            by_country = {row["row"]["country"]: row for row in shown}
            assert by_country[nasty]["window"] == "open"
            assert by_country[nasty]["row"]["day"] == "1970-01-01"
            assert by_country[""]["row"]["half"] == str(1 << 60)
            for country, half, big in ((nasty, "12", "true"), ("", str(1 << 60), "True")):
                answer = await asking.get(
                    "/api/tables/typed/row", country=country, half=half, big=big, day="1970-01-01",
                    window_start="1970-01-01T01:00:00",
                )  # fmt: skip
                assert answer.json["row"]["n"] == 1, answer
            wrong = await asking.get(
                "/api/tables/typed/row", country="", half="twelve", big="true", day="1970-01-01", window_start=0
            )
            assert (wrong.status, "half='twelve' is not a Int64" in wrong.error) == (400, True)
            nulls = await asking.get(
                "/api/tables/typed/row", country="", half="1", null="big,day", window_start=3_600_000
            )
            assert (nulls.status, nulls.json["row"]) == (200, None)

    asyncio.run(scenario())


def test_uncommitted_rows_are_never_shown(tmp_path: Path) -> None:
    app = new_app(tmp_path, web_enabled=True, web_port=free_port(), commit_interval="1h")
    table = app.Table("seen", default=int)
    topic = app.topic("words", value_serializer="raw", partitions=1)

    @app.agent(topic)  # type: ignore[untyped-decorator]  # Faust's own
    async def count(stream: Any) -> None:
        async for word in stream:
            table[word.decode()] += 1

    async def scenario() -> None:
        async with running(app), client(app) as asking:
            await until(app.runtime.ready.is_set, "the app to be ready")
            task = app.runtime.tasks[TaskId("agents", 0)]
            await topic.send(value=b"hello")
            await until(lambda: task.overlay("seen").get("hello"), "the agent to count")
            assert (await asking.get("/api/tables/seen/rows")).json["rows"] == []
            assert (await asking.get("/api/tables/seen/row", key="hello")).json["row"] is None
            app.runtime.commit_now()
            await until(lambda: app.runtime.committed("seen", "hello"), "the commit")
            assert (await asking.get("/api/tables/seen/row", key="hello")).json["row"] == {"key": "hello", "value": 1}

    asyncio.run(scenario())


def test_events_tell_of_commits_and_let_the_server_stop_at_once(tmp_path: Path) -> None:
    app = new_app(tmp_path, web_enabled=True, web_port=free_port())
    topic = app.topic("words", value_serializer="raw", partitions=1)

    @app.agent(topic)  # type: ignore[untyped-decorator]  # Faust's own
    async def read(stream: Any) -> None:
        async for _ in stream:
            pass

    async def scenario() -> None:
        async with aiohttp.ClientSession() as session:
            async with running(app):
                await until(app.runtime.ready.is_set, "the app to be ready")
                events = await session.get(f"http://127.0.0.1:{app.conf.web_port}/api/events")
                assert events.content_type == "text/event-stream"
                before = await next_event(events)
                await topic.send(value=b"hello")
                while (after := await next_event(events))["tasks"][0]["records"] == 0:
                    pass
                assert after["now"] > before["now"]
                assert after["tasks"][0]["epoch"] > before["tasks"][0]["epoch"]
                began = asyncio.get_running_loop().time()
            assert asyncio.get_running_loop().time() - began < 5
            events.close()

    asyncio.run(scenario())


async def next_event(events: aiohttp.ClientResponse) -> Any:
    async with asyncio.timeout(10):
        while not (line := await events.content.readline()).startswith(b"data: "):
            pass
    return json.loads(line[6:])
