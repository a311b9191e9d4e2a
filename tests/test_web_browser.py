"""The pages in a real browser: what is in the tables is on the screen, it changes by itself, and nothing fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright, expect

import streamproc as sp
from streamproc.app import App
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import OutRecord
from tests.apps import new_app, running, until, write
from tests.web import flights_running, free_port, load_agent

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
NASTY = "<img src=x onerror=\"document.title='owned'\">"


@asynccontextmanager
async def browsing(port: int, **settings: Any) -> AsyncIterator[tuple[Page, str]]:
    """A page that fails the test if anything is written to its console, fails to load or is asked of another host."""
    trouble: list[str] = []
    base = f"http://127.0.0.1:{port}"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = await browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **settings})
        page.on("console", lambda said: trouble.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith(base) or trouble.append(f"asked {request.url}"))
        page.set_default_timeout(15_000)
        yield page, base
        await browser.close()
    assert trouble == []


def browse_flights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Page, str], Awaitable[None]], **settings: Any
) -> None:
    app = load_agent("flights", folder, monkeypatch)

    async def scenario() -> None:
        async with flights_running(app, folder), browsing(app.conf.web_port, **settings) as (page, base):
            await look(page, base)

    asyncio.run(scenario())


def test_the_overview_shows_pipeline_tables_and_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(page: Page, base: str) -> None:
        await page.goto(base)  # a browser is led from / to the page
        await expect(page).to_have_url(f"{base}/streamproc/")
        await expect(page.get_by_role("status")).to_have_text("live")
        await expect(page.locator("svg.graph .node .label")).to_have_text(
            ["flights", "expect", "dedupe", "with columns", "hourly", "daily"]
        )
        tasks = page.get_by_role("region", name="Tasks")
        await expect(tasks.locator("tbody tr")).to_have_count(12)
        await expect(tasks.locator("tbody tr").first).to_contain_text("read-flights:0")
        await expect(tasks.locator("tbody tr").first).to_contain_text("end of input")
        await expect(page.locator(".picture svg")).to_have_count(2)
        await page.get_by_role("region", name="Pipeline graph").get_by_role("link").first.click()
        await expect(page.get_by_role("heading", name="hourly")).to_be_visible()

    browse_flights(tmp_path, monkeypatch, look)


def test_a_table_is_filtered_paged_and_chosen_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(page: Page, base: str) -> None:
        await page.goto(f"{base}/streamproc/tables/hourly")
        rows = page.get_by_role("region", name="Rows").locator("tbody tr")
        await expect(rows).to_have_count(50)
        await expect(page.locator("svg.chart rect.bar")).to_have_count(60)
        first = await rows.first.inner_text()
        await page.get_by_role("button", name="Older").click()
        await expect(page.locator(".pager")).to_contain_text("page 2")
        assert await rows.first.inner_text() != first
        await page.get_by_role("button", name="Newer").click()
        await expect(rows.first).to_contain_text(first.split()[3])
        await page.get_by_label("Filter by key").fill("UA JFK")
        await expect(rows.first).to_contain_text("UA")
        await expect(rows.filter(has_text="EWR")).to_have_count(0)
        await page.get_by_label("Show").select_option("mean_delay")
        await expect(page.locator("svg.chart path.line")).to_have_count(1)
        # By keyboard: a window is chosen in the table beside the chart.
        await page.get_by_text("Windows as a table").click()
        window = page.get_by_role("region", name="Windows").get_by_role("button").nth(3)
        await window.focus()
        await page.keyboard.press("Enter")
        await expect(rows).to_have_count(1)
        await page.get_by_role("button", name="All windows").click()
        await expect(rows).to_have_count(50)

    browse_flights(tmp_path, monkeypatch, look)


def test_side_topics_tell_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(page: Page, base: str) -> None:
        await page.goto(f"{base}/streamproc/side")
        dead = page.get_by_role("region", name="flights-flights-dead-letters")
        await expect(dead.locator("tbody tr")).to_have_count(100)
        await expect(page.locator(".reasons").first).to_contain_text("dep_delay sane")
        await expect(page.get_by_role("region", name="flights-late-hourly").locator("tbody tr")).to_have_count(100)

    browse_flights(tmp_path, monkeypatch, look)


@pytest.mark.parametrize("page_name", ["", "tables/hourly", "side"])
def test_a_narrow_dark_screen_scrolls_tables_not_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_name: str
) -> None:
    async def look(page: Page, base: str) -> None:
        await page.goto(f"{base}/streamproc/{page_name}")
        await expect(page.locator("tbody tr:visible").first).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") == 400
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 22, 28)"
        fields = "[...document.querySelectorAll('input, select, button')]"
        assert await page.evaluate(f"{fields}.filter((e) => !e.labels?.length && !e.textContent.trim()).length") == 0

    browse_flights(tmp_path, monkeypatch, look, viewport={"width": 400, "height": 800}, color_scheme="dark")


def living_app(folder: Path) -> App:
    app = new_app(folder, web_enabled=True, web_port=free_port())
    topic = app.topic("events", value_schema="event.avsc", event_time=sp.event_time("at", out_of_orderness="0s"))
    stream = app.pipeline(topic).group_by("country").window(sp.tumbling("1h"))
    stream.agg(n=sp.count(), total=sp.sum("amount")).table("totals")
    return app


def test_new_rows_appear_by_themselves_and_text_stays_text(tmp_path: Path) -> None:
    app = living_app(tmp_path)
    encoder = Encoder(load_schema(tmp_path / "schemas" / "event.avsc"), 1)

    def event(country: str, at: int) -> OutRecord:
        value = {"id": "1", "country": country, "amount": 1.0, "at": at}
        return OutRecord(b"k", encoder.encode(value), (), at + 1)

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [])
        async with running(app), browsing(app.conf.web_port) as (page, base):
            await until(app.runtime.ready.is_set, "the app to be ready")
            tp = TopicPartition("events", 0)
            await page.goto(f"{base}/streamproc/tables/totals")
            await expect(page.get_by_text("No rows yet")).to_be_visible()
            await app.runtime.transport.send({tp: [event(NASTY, 1_000), event("DE", 2_000)]})
            rows = page.get_by_role("region", name="Rows").locator("tbody tr")
            await expect(rows).to_have_count(2)
            await expect(rows.filter(has_text=NASTY)).to_have_count(1)
            await expect(rows.filter(has_text="DE")).to_contain_text("open")
            await app.runtime.transport.send({tp: [event("DE", 2_000), event("FR", 3_600_000)]})
            await expect(rows).to_have_count(3)
            await expect(rows.filter(has_text="DE")).to_contain_text("final")
            assert await page.locator("main img").count() == 0
            assert await page.title() == "totals · test"
            await page.goto(f"{base}/streamproc/")
            await expect(page.get_by_role("region", name="Tasks").locator("tbody tr").first).to_contain_text(
                "read-events:0"
            )
            before = await page.locator(".figure").nth(1).inner_text()
            await app.runtime.transport.send({tp: [event("IT", 3_600_001)] * 7})
            await expect(page.locator(".figure").nth(1)).not_to_have_text(before, use_inner_text=True)
            await expect(page.locator(".figure").nth(1)).to_contain_text("11")

    asyncio.run(scenario())


def test_a_table_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    app = living_app(tmp_path)

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [])
        async with running(app), browsing(app.conf.web_port) as (page, base):
            await page.goto(f"{base}/streamproc/tables/nothing%3Cb%3E")
            await expect(page.get_by_text("There is no table nothing<b>. There is: totals.")).to_be_visible()

    asyncio.run(scenario())
