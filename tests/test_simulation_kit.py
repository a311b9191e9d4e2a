"""What users get: their own app under faults (`simulate`) and under their hand in virtual time (`Driver`)."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import streamproc as sp
from streamproc import App, UserError
from streamproc.runtime.epoch import commit
from streamproc.testing import Driver, FakeSink, Outcome, Record, simulate
from tests.apps import events_avsc
from tests.test_docs import ROOT, environment, write_files

MINUTE_MS = 60_000
AT = datetime(2026, 1, 1, tzinfo=UTC)
WORDS = [Record(word, key=word) for word in "abcab" * 12]
COUNTS = {"a": 24, "b": 24, "c": 12}


def counting(app: App) -> App:
    words, out = app.topic("words", partitions=2), app.topic("out", partitions=2)
    counts = app.Table("counts", default=int)

    @app.agent(words)
    async def count(stream: Any) -> None:
        async for word in stream:
            if word == "bad":
                raise ValueError(word)
            counts[word] += 1
            await out.send(key=word, value=counts[word])

    return app


def counts_words() -> App:
    return counting(App("words"))


def remembers_outside_of_tables() -> Callable[[], App]:
    """An app whose result depends on how often its agent saw a record."""
    seen: dict[str, int] = {}

    def build() -> App:
        app = App("words")
        words, counts = app.topic("words", partitions=2), app.Table("counts", default=int)

        @app.agent(words)
        async def count(stream: Any) -> None:
            async for word in stream:
                seen[word] = counts[word] = seen.get(word, counts[word]) + 1

        return app

    return build


@pytest.fixture
def revenue(tmp_path: Path) -> Callable[..., Callable[[], App]]:
    """Makers of a pipeline over `tests.apps.EVENT`, per country and minute."""
    schemas = events_avsc(tmp_path)

    def maker(lateness: str = "0s", **times: Any) -> Callable[[], App]:
        def build() -> App:
            app = App("shop", schemas=schemas)
            time = sp.event_time("at", **{"out_of_orderness": "10s", **times})
            events = app.topic("events", value_schema="event.avsc", partitions=2, event_time=time)
            table = (
                app.pipeline(events)
                .dedupe("id", within="1d")
                .group_by("country")
                .window(sp.tumbling("1m"), allowed_lateness=lateness)
                .agg(n=sp.count(), amount=sp.sum("amount"))
                .table("revenue")
            )
            table.late.to("late")
            table.sink(FakeSink("closed"), emit="on_close").sink(FakeSink("all"))
            return app

        return build

    return maker


def event(number: int, minute: float, country: str = "DE", amount: float = 1.0) -> dict[str, Any]:
    at = AT.timestamp() * 1000 + minute * MINUTE_MS
    return {"id": str(number), "country": country, "amount": amount, "at": int(at)}


def events(count: int = 60) -> list[Record]:
    """Ten a minute, some twice, some late, one without a time."""
    found = [event(n, n / 10 - (3 if n % 17 == 16 else 0), "DE" if n % 3 else "FR", n) for n in range(count)]
    found += [found[4], {**event(count, 0), "at": None}]
    return [Record(one, key=one["country"]) for one in found]


# ---- simulate


def test_an_app_that_keeps_to_tables_leaves_what_a_run_without_faults_leaves() -> None:
    report = simulate(counts_words, {"words": [*WORDS, Record("bad", key="a")]}, seeds=range(2))
    assert report.seeds == [0, 1]
    assert report.epochs > 20
    assert report.died_at
    assert 0 < len(report.died_at) < report.steps
    assert str(report).startswith("2 seeds: ")


def test_state_outside_of_tables_is_caught_and_the_failure_says_where_why_and_how_to_replay() -> None:
    code, hook, disabled = commit.__code__, sys.unraisablehook, logging.root.manager.disable
    with pytest.raises(AssertionError) as failed:
        simulate(remembers_outside_of_tables(), {"words": WORDS}, seeds=range(3))
    told = str(failed.value)
    assert re.match(
        r"simulate\(build\): seed [012] failed: not what a run without faults leaves:\n  app.Table counts", told
    )
    assert "is killed" in told
    assert re.search(r"To replay: simulate\(build, …, seeds=\[[012]\]\)", told)
    # Everything else in the process is as it was.
    assert commit.__code__ is code
    assert (sys.unraisablehook, logging.root.manager.disable) == (hook, disabled)
    assert asyncio._get_running_loop() is None


def test_a_seed_has_the_same_course_whatever_ran_before_it() -> None:
    def course(seeds: list[int]) -> str:
        with pytest.raises(AssertionError) as failed:
            simulate(counts_words, {"words": WORDS}, seeds, oracle=Failing(after=len(seeds)))
        return str(failed.value)

    assert course([6, 5]) == course([5])


class Failing:
    """An oracle that fails from its second call on."""

    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, outcome: Outcome) -> None:
        self._left -= 1
        if self._left < 0:
            raise AssertionError("as told")


def test_an_oracle_of_ones_own_sees_tables_topics_late_records_dead_letters_and_sinks(
    revenue: Callable[..., Callable[[], App]],
) -> None:
    def oracle(outcome: Outcome) -> None:
        sums = {
            (row["country"], row["window_start"].minute): (row["n"], row["amount"]) for row in outcome.rows["revenue"]
        }
        assert sums["DE", 0] == (7, 1 + 2 + 4 + 5 + 7 + 8 + 0)
        assert sums["FR", 1] == (3, 12 + 15 + 18)
        assert outcome.sinks == {"closed": outcome.rows | {}, "all": outcome.rows | {}}
        assert sorted(record.value["id"] for record in outcome.topics["late"]) == ["16", "33", "50"]
        (dead,) = outcome.topics["shop-events-dead-letters"]
        assert (dead.key, dead.value["id"], dead.headers["sp-topic"]) == ("DE", "60", b"events")
        assert outcome.side_topics == {"late", "shop-events-dead-letters"}

    seen = events()
    seen[0] = Record({**event(0, 0, "DE"), "amount": 0.0}, key="DE")
    simulate(revenue(), {"events": seen}, seeds=[0], oracle=oracle)


def test_a_pipeline_with_idle_sources_depends_on_its_input_alone(revenue: Callable[..., Callable[[], App]]) -> None:
    simulate(revenue(idle_after="1s"), {"events": events(30)}, seeds=[0])


def test_outputs_per_key_are_in_order() -> None:
    def oracle(outcome: Outcome) -> None:
        assert outcome.tables == {"counts": COUNTS}
        assert outcome.rows == outcome.sinks == {}
        sent = [record.value for record in outcome.topics["out"] if record.key == "a"]
        assert sent == list(range(1, 25))
        assert outcome.topics["words-words-dead-letters"] == []

    simulate(counts_words, {"words": WORDS}, seeds=[], oracle=oracle)


def test_an_oracle_that_fails_without_any_fault_is_no_seeds_failure() -> None:
    with pytest.raises(AssertionError, match=r"^as told"):
        simulate(counts_words, {"words": WORDS}, oracle=Failing(after=0))


def test_an_app_that_cannot_run_says_why_as_a_worker_does(tmp_path: Path) -> None:
    def build() -> App:
        app = counts_words()

        @app.agent(app.topic("others", partitions=3))
        async def other(stream: Any) -> None: ...

        return app

    with pytest.raises(UserError, match="different partition counts"):
        simulate(build, {"words": WORDS})


def test_a_named_app_is_executed_anew_for_every_worker_and_its_modules_are_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "wordshop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(
        "import streamproc as sp\napp = sp.App('words')\nwords = app.topic('words', partitions=2)\n"
    )
    (package / "agents.py").write_text(
        "from wordshop.base import app, words\n"
        "counts = app.Table('counts', default=int)\n"
        "@app.agent(words)\n"
        "async def count(stream):\n"
        "    async for word in stream:\n"
        "        counts[word] += 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import wordshop.base  # type: ignore[import-not-found]

    mine, before = wordshop.base.app, set(sys.modules)
    report = simulate("wordshop.agents:app", {"words": WORDS}, seeds=[0])
    assert report.epochs
    assert sys.modules["wordshop.base"].app is mine
    assert "wordshop.agents" not in set(sys.modules) - before
    for name in [name for name in sys.modules if name.startswith("wordshop")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("use", [lambda: simulate(counts_words, {}), lambda: Driver(counts_words).__enter__()])
def test_both_say_so_when_they_are_called_inside_a_running_event_loop(use: Callable[[], object]) -> None:
    async def scenario() -> None:
        use()

    with pytest.raises(UserError, match=r"inside a running event loop.*Call it from a plain function"):
        asyncio.run(scenario())


def test_mistakes_in_the_call_are_named() -> None:
    app = counts_words()
    with pytest.raises(UserError, match="give its name"):
        simulate(app, {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the same app twice"):
        simulate(lambda: app, {"words": WORDS})
    with pytest.raises(UserError, match=r"no topic 'wrds'.*out, words"):
        simulate(counts_words, {"wrds": WORDS})
    with pytest.raises(UserError, match="no partition 2"):
        simulate(counts_words, {"words": [Record("a", partition=2)]})


# ---- Driver


def test_a_window_closes_when_event_time_has_passed_it(revenue: Callable[..., Callable[[], App]]) -> None:
    with Driver(revenue()) as driver:
        for number, minute in enumerate([0.1, 0.5, 0.9, 1.3]):
            driver.send("events", event(number, minute, amount=10), partition=0)
        driver.send("events", event(4, 1.4, "FR"), partition=1)
        first, *_ = driver.rows("revenue")
        assert (first["country"], first["window_start"], first["n"], first["amount"]) == ("DE", AT, 3, 30.0)
        assert driver.rows("revenue", emit="on_close") == [first] == driver.sink("closed")["revenue"]
        assert len(driver.sink("all")["revenue"]) == 3
        driver.send("events", event(5, 0.2), partition=0)
        driver.send("events", event(5, 0.2), partition=0)
        assert [record.value["id"] for record in driver.topic("late")] == ["5"]


def test_idleness_and_its_watermark_follow_processing_time(revenue: Callable[..., Callable[[], App]]) -> None:
    with Driver(revenue(idle_after="30s")) as driver:
        driver.send("events", event(0, 0.5), partition=0)
        driver.advance("20s")
        assert driver.rows("revenue", emit="on_close") == []
        driver.advance("2m")
        assert len(driver.rows("revenue", emit="on_close")) == 1


def test_timers_of_the_app_run_in_virtual_time() -> None:
    def build() -> App:
        app = counts_words()
        words = app.topic("words")

        @app.timer(60.0)
        async def minute() -> None:
            await words.send(key="tick", value="tick")

        return app

    with Driver(build) as driver:
        driver.advance("5m10s")
        assert driver.table("counts") == {"tick": 5}


def test_nothing_is_lost_or_counted_twice_by_a_crash_a_restart_a_rebalance_or_a_lost_disk() -> None:
    with Driver(counts_words, workers=2) as driver:
        expected = 0
        for fail in (
            driver.crash,
            lambda: driver.crash(1, lose_disk=True),
            driver.restart,
            driver.rebalance,
            lambda: driver.advance("1h"),
        ):
            for word in ("a", "b"):
                driver.send("words", word, key=word)
            expected += 1
            fail()
            assert driver.table("counts") == {"a": expected, "b": expected}
        sent = [record.value for record in driver.topic("out") if record.key == "a"]
        assert sent == list(range(1, expected + 1))


def test_a_record_that_fails_its_agent_is_a_dead_letter() -> None:
    with Driver(counts_words) as driver:
        driver.send("words", "bad", key="k")
        driver.send("words", "good", key="k")
        assert driver.table("counts") == {"good": 1}
        (dead,) = driver.topic("words-words-dead-letters")
        assert (dead.key, dead.value) == ("k", "bad")


def test_a_worker_that_stops_by_itself_raises_its_reason() -> None:
    with Driver(lambda: counting(App("words", agent_on_fail="stop"))) as driver:
        driver.send("words", "bad")
        with pytest.raises(UserError, match="count"):
            driver.table("counts")


def test_what_the_app_does_not_have_is_named() -> None:
    with Driver(counts_words) as driver:
        with pytest.raises(UserError, match=r"no app.Table 'count'\. There are counts"):
            driver.table("count")
        with pytest.raises(UserError, match=r"no table of a pipeline 'counts'\. There are none"):
            driver.rows("counts")
        with pytest.raises(UserError, match="no sink 'redis'"):
            driver.sink("redis")
        with pytest.raises(UserError, match="no topic 'nowhere'"):
            driver.topic("nowhere")


# ---- the page for users


@pytest.mark.slow
def test_the_tests_of_the_page_for_users_pass(tmp_path: Path) -> None:
    write_files(ROOT / "docs" / "testing-your-agents.md", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(tmp_path)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
