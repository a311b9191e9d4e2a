"""Asking a running app's web server, as a browser or a script would."""

from __future__ import annotations

import importlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from yarl import URL

from demo.data import make_feed
from demo.feed import write_feed
from streamproc.app import App
from tests.apps import log, running, until

__all__ = ["DAYS", "Answer", "Client", "client", "flights_running", "free_port", "load_agent"]

DAYS = 12


class Answer(NamedTuple):
    status: int
    text: str
    headers: Any

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        return str(self.json["error"]["message"])


class Client:
    """Of one worker; follows no redirect."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url

    async def get(self, path: str, headers: dict[str, str] | None = None, **parameters: Any) -> Answer:
        async with self.session.get(
            self.url + path, params=parameters, headers=headers, allow_redirects=False
        ) as response:
            return Answer(response.status, await response.text(), response.headers)


@asynccontextmanager
async def client(app: App) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, f"http://127.0.0.1:{app.conf.web_port}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def load_agent(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    """A program of agents/ on a log of its own, with its web server on a free port."""
    monkeypatch.setenv("STREAMPROC_BROKER", f"embedded://{folder}/log")
    monkeypatch.delenv("STREAMPROC_WEB_TOKEN", raising=False)
    app: App = importlib.reload(importlib.import_module(f"agents.{name}")).app
    app.conf.datadir = folder / "state"
    app.conf.web_port = free_port()
    app.conf.canonical_url = URL(f"http://127.0.0.1:{app.conf.web_port}")
    app.conf.topic_disable_leader = True
    app.commit_interval_s = 0.05
    return app


@asynccontextmanager
async def flights_running(app: App, folder: Path) -> AsyncIterator[Client]:
    """The main job over `DAYS` real days, finished, and a client of it."""
    async with log(folder) as transport:
        await write_feed(make_feed(DAYS), transport, quiet=True)
    async with running(app), client(app) as asking:
        await until(app.runtime.finished, "the main job to finish", 60)
        yield asking
