"""One result by a pipeline and by the per-record API, over real flights, and equal also after a kill in the middle."""

from __future__ import annotations

import asyncio
import importlib
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from demo.data import Faults, make_feed
from demo.feed import write_feed
from tests.apps import log, rows_of, running, until


def by_record(app: Any) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for task in app.runtime.tasks.values():
        if task.id.group == "agents" and task.work is not None:
            found.update(task.overlay("totals_by_record").items())
    return found


def by_column(app: Any) -> dict[tuple[str, str], int]:
    def day(start: datetime) -> str:
        return start.date().isoformat()

    return {(row["origin"], day(row["window_start"])): row["flights"] for row in rows_of(app, "totals_by_column")}


def test_pipeline_and_per_record_agent_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMPROC_BROKER", f"embedded://{tmp_path}/log")
    module = importlib.reload(importlib.import_module("agents.totals"))
    app = module.app
    app.conf.web_enabled = False
    app.conf.datadir = tmp_path / "state"
    feed = make_feed(14, Faults())

    async def scenario() -> None:
        async with log(tmp_path) as transport:
            await write_feed(feed, transport, quiet=True)
        async with running(app):
            total = len(feed.rows)
            await until(lambda: app.runtime.counts().get("flights") == total, "the pipeline to read all")
            dead = 50
            await until(lambda: sum(by_record(app).values()) >= total - dead, "the agent to count all")
            await until(lambda: sum(by_column(app).values()) >= total - dead, "the pipeline to count all")
            await asyncio.sleep(0.2)
            assert by_record(app) == by_column(app)
            assert sum(by_record(app).values()) == total - dead

    asyncio.run(scenario())
