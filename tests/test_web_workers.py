"""Two workers' worth of web servers: one holds the tasks, the other is asked and goes to the owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import streamproc as sp
from streamproc.app import App
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core import limits
from streamproc.transport.contract import OutRecord
from streamproc.web.workers import HOP
from tests.apps import new_app, running, until, write
from tests.web import Client, client, free_port

TOKEN = "between-workers"
ROW = "/api/tables/totals/row"
HOURS = 40


def totals_app(folder: Path, events: list[tuple[int, OutRecord]], **options: Any) -> App:
    folder.mkdir()
    port = free_port()
    app = new_app(
        folder, web_enabled=True, web_port=port, canonical_url=f"http://127.0.0.1:{port}", web_token=TOKEN, **options
    )
    topic = app.topic(
        "events", value_schema="event.avsc", partitions=2, event_time=sp.event_time("at", out_of_orderness="0s")
    )
    totals = app.pipeline(topic).group_by("country").window(sp.tumbling("1h")).agg(n=sp.count(), total=sp.sum("amount"))
    totals.table("totals")
    seen = app.Table("seen", default=int)

    @app.agent(topic)  # type: ignore[untyped-decorator]  # Faust's own
    async def count(stream: Any) -> None:
        async for event in stream:
            seen[event.country] += 1

    return app


def events(folder: Path) -> list[tuple[int, OutRecord]]:
    encoder = Encoder(load_schema(folder / "schemas" / "event.avsc"), 1)
    found = []
    for number in range(200):
        at = number % HOURS * 3_600_000
        value = {"id": str(number), "country": f"C{number % 7}", "amount": number / 2, "at": at}
        found.append((number % 2, OutRecord(value["country"].encode(), encoder.encode(value), (), at + 1)))
    return found


@asynccontextmanager
async def two_workers(folder: Path) -> AsyncIterator[tuple[App, App]]:
    """The first holds every partition. The second has given all up, as after a rebalance, and knows who has them."""
    owner, asked = totals_app(folder / "one", []), totals_app(folder / "two", [])
    await write(folder / "one", "events", 2, events(folder / "one"))
    async with running(owner), running(asked):
        await until(asked.runtime.ready.is_set, "the second worker")
        await until(lambda: owner.runtime.counts().get("events") == 200, "the first worker to read all")
        await asked.runtime.close_tasks()
        topics = {topic: list(range(2)) for group in owner.runtime.groups.values() for topic in group.plan.sources}
        asked.assignor.external_topic_distribution = {str(owner.conf.canonical_url): topics}
        yield owner, asked


def ask(folder: Path, questions: Callable[[Client, App, App], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with two_workers(folder) as (owner, asked), client(asked) as asking:
            asking.session.headers["Authorization"] = f"Bearer {TOKEN}"
            await settled(owner)
            await questions(asking, owner, asked)

    asyncio.run(scenario())


async def settled(owner: App) -> None:
    """Nothing more is under way: what is asked twice is told twice the same."""

    def epochs() -> list[int]:
        return [task.record.epoch for task in owner.runtime.tasks.values() if task.record]

    before: list[int] = []
    while before != epochs():
        before = epochs()
        await asyncio.sleep(0.3)


def test_a_row_is_told_by_the_worker_that_owns_it(tmp_path: Path) -> None:
    async def questions(asking: Client, owner: App, asked: App) -> None:
        async with client(owner) as direct:
            direct.session.headers["Authorization"] = f"Bearer {TOKEN}"
            for number in range(14):
                named = {"country": f"C{number % 7}", "window_start": number * 3_600_000}
                far, near = await asking.get(ROW, **named), await direct.get(ROW, **named)
                assert far.status == 200
                row, own = far.json, near.json
                assert row.pop("worker") == str(owner.conf.canonical_url)
                assert own["row"]["country"] == named["country"]
                assert {**row, "commit_age_ms": 0} == {**own, "commit_age_ms": 0}

    ask(tmp_path, questions)


def test_lists_are_gathered_from_all_workers(tmp_path: Path) -> None:
    async def questions(asking: Client, owner: App, asked: App) -> None:
        rows: list[Any] = []
        after: str | None = ""
        while after is not None:
            answer = (await asking.get("/api/tables/totals/rows", limit=13, **({"after": after} if after else {}))).json
            assert (answer["partitions"], answer["missing_partitions"], answer["problems"]) == ([0, 1], [], [])
            rows += answer["rows"]
            after = answer["next"]
        assert sum(row["row"]["n"] for row in rows) == 200 - late(owner)
        assert [row["row"]["window_start"] for row in rows] == sorted(
            (row["row"]["window_start"] for row in rows), reverse=True
        )
        windows = (await asking.get("/api/tables/totals/windows", limit=HOURS)).json["windows"]
        assert sum(window["sum"] for window in windows) == 200 - late(owner)
        tasks = (await asking.get("/api/tasks")).json["tasks"]
        assert {task["worker"] for task in tasks} == {str(owner.conf.canonical_url)}
        assert len(tasks) == 6
        assert (await asking.get("/api/tasks", local="1")).json["tasks"] == []
        local = (await asking.get("/api/tables/totals/rows", local="1")).json
        assert (local["rows"], local["missing_partitions"]) == ([], [0, 1])

    ask(tmp_path, questions)


def late(owner: App) -> int:
    return sum(sum(task.work.counters.late.values()) for task in owner.runtime.tasks.values() if task.work is not None)


def test_a_row_of_an_agents_table_is_looked_for_everywhere(tmp_path: Path) -> None:
    async def questions(asking: Client, owner: App, asked: App) -> None:
        await until(lambda: owner.runtime.committed("seen", "C6"), "the agents' commit")
        answer = (await asking.get("/api/tables/seen/row", key='"C3"')).json
        values = [answer["row"]["value"], *(other["row"]["value"] for other in answer["others"])]
        # One country came in both partitions, and each task counts its own.
        assert len(values) == 2
        assert sum(values) == len(range(3, 200, 7))
        assert {answer["worker"]} == {str(owner.conf.canonical_url)}
        assert (await asking.get("/api/tables/seen/row", key='"nobody"')).json["row"] is None

    ask(tmp_path, questions)


def test_a_forwarded_question_is_not_forwarded_again(tmp_path: Path) -> None:
    async def questions(asking: Client, owner: App, asked: App) -> None:
        answer = await asking.get(ROW, {HOP: "1"}, country="C1", window_start=3_600_000)
        assert (answer.status, "not ready" in answer.error) == (503, True)
        # Two workers that each take the other for the owner.
        await owner.runtime.close_tasks()
        url = str(asked.conf.canonical_url)
        topics = next(iter(asked.assignor.external_topics_metadata().values()))
        owner.assignor.external_topic_distribution = {url: topics}
        answer = await asking.get(ROW, country="C1", window_start=3_600_000)
        assert (answer.status, "not ready" in answer.error) == (503, True)

    ask(tmp_path, questions)


def test_an_owner_that_is_gone_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WEB_WORKER_TIMEOUT_S", 0.5)

    async def questions(asking: Client, owner: App, asked: App) -> None:
        topics = next(iter(asked.assignor.external_topics_metadata().values()))
        silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        for url in (f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{port}"):
            asked.assignor.external_topic_distribution = {url: topics}
            answer = await asking.get(ROW, country="C1", window_start=3_600_000)
            assert (answer.status, answer.json["error"]["worker"]) == (503, url)
            assert "does not answer" in answer.error
            listed = (await asking.get("/api/tables/totals/rows")).json
            assert (listed["rows"], listed["missing_partitions"]) == ([], [0, 1])
            assert url in listed["problems"][0]
        silent.close()

    ask(tmp_path, questions)


def test_mistakes_are_told_by_the_worker_that_was_asked(tmp_path: Path) -> None:
    async def questions(asking: Client, owner: App, asked: App) -> None:
        assert "Did you mean country" in (await asking.get(ROW, contry="C1", window_start=0)).error
        asking.session.headers["Authorization"] = "Bearer wrong"
        assert (await asking.get(ROW, country="C1", window_start=0)).status == 401

    ask(tmp_path, questions)
