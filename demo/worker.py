"""The main job as the demo runs it: `agents/flights.py` and, on the worker's own port, pages by which the demo follows
and checks it from outside.

    faust -A demo.worker worker

``/demo/progress``: records committed and taken in, and whether the job is done. ``/demo/tables/NAME``: every row of a
table, out of the worker's keyed state. ``/demo/topics/NAME``: every record of a small topic (the log is a file that
the worker alone may open).
"""

from __future__ import annotations

import base64
import os
import signal
from typing import Any, Final

import msgspec
import polars as pl

from agents.flights import app, flights
from streamproc.core.types import Offset, TopicPartition

__all__ = ["app"]

TOPIC_RECORDS_MAX: Final = 10_000
"""Of all partitions: the pages are for late records and dead letters, not for a log."""


PARENT_CHECK_S: Final = 1.0


@app.task
async def follow_parent() -> None:
    """The demo that started this worker may be killed without a word; nothing of it is to be left running."""
    parent = os.environ.get("STREAMPROC_DEMO_PARENT")
    while parent is not None:
        if str(os.getppid()) != parent:
            signal.raise_signal(signal.SIGTERM)
            return
        await app.clock.sleep(PARENT_CHECK_S)


@app.page("/demo/progress")
async def progress(web: Any, request: Any) -> Any:
    """``position``: records of the source that are behind a commit, over all runs. ``records``: those of this run."""
    runtime = app.runtime
    source = [task for task in runtime.tasks.values() if task.id.group.startswith("read-")]
    name = flights.get_topic_name()
    position = sum(task.committed_position(TopicPartition(name, task.id.partition)) or 0 for task in source)
    problems = [f"{task.id}: {task.view.problem}" for task in runtime.tasks.values() if task.view.problem]
    about = {
        "position": position,
        "records": sum(runtime.counts().values()),
        "commits": sum(task.view.commits for task in runtime.tasks.values()),
        "finished": runtime.finished(),
        "problems": problems,
    }
    return _json(web, about)


@app.page("/demo/tables/{name}")
async def table(web: Any, request: Any, name: str) -> Any:
    """Rows as JSON, times in milliseconds. All of them are committed once ``finished`` is true."""
    rows: list[dict[str, Any]] = []
    for task in app.runtime.tasks.values():
        if task.id.group == f"table-{name}" and task.work is not None:
            frame = task.work.results(task.overlay(name).scan(b"", None)).filter("__visible")
            frame = frame.drop("__state", "__epoch", "__visible")
            rows += frame.with_columns(pl.col(pl.Datetime).dt.epoch("ms")).to_dicts()
    return _json(web, rows)


@app.page("/demo/topics/{name}")
async def topic(web: Any, request: Any, name: str) -> Any:
    """Committed records: partition, headers and value, bytes in base64."""
    transport = app.runtime.transport
    found: list[dict[str, Any]] = []
    for partition in range(await transport.partitions(name) or 0):
        tp = TopicPartition(name, partition)
        ends = (await transport.offsets([tp]))[tp]
        async for batch in transport.read(tp, Offset(ends.begin), ends.stable):
            for row in range(min(len(batch), TOPIC_RECORDS_MAX - len(found))):
                headers = {header: _text(value) for header, value in batch.headers(row)}
                found.append({"partition": partition, "headers": headers, "value": _text(batch.value(row))})
    return _json(web, found)


def _text(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def _json(web: Any, value: Any) -> Any:
    return web.bytes(msgspec.json.encode(value), content_type="application/json")
