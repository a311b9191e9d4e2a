"""The app at one glance: its graph, its tasks on every worker, its tables; what the live page is told each second."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from streamproc.core.types import END_OF_TIME, NO_WATERMARK, Offset, TopicPartition
from streamproc.runtime.inspect import Inspector, TaskFacts
from streamproc.web.answers import Question, plain
from streamproc.web.fresh import Fresh
from streamproc.web.graph import graph_of
from streamproc.web.tables import Tables
from streamproc.web.workers import Workers

__all__ = ["Overview"]


class Overview:
    """Of one worker's tasks, or of all workers'."""

    def __init__(self, app: Any, inspector: Inspector, tables: Tables, workers: Workers) -> None:
        self._app, self._inspector, self._tables, self._workers = app, inspector, tables, workers
        self._ends: Fresh[dict[TopicPartition, Offset]] = Fresh(inspector.ends, app.clock, {})
        self._whole: Fresh[dict[str, Any]] = Fresh(self._gather, app.clock, {}, age_s=0.5)

    def close(self) -> None:
        self._ends.close()
        self._whole.close()

    async def tasks(self, question: Question, *, local: bool) -> dict[str, Any]:
        """Every task with its lag, watermark and commit age."""
        question.done()
        if local:
            return {"tasks": await self._own()}
        whole = await self.read()
        return {"tasks": whole["tasks"], "workers": whole["workers"]}

    async def read(self) -> dict[str, Any]:
        """The whole, shared by all who look at it."""
        return await self._whole.get() or await self._gather()

    async def _gather(self) -> dict[str, Any]:
        own = await self._own()
        told = await self._workers.ask_others("/api/tasks", {"local": "1"})
        tasks = [*own, *(task for one in told if one.answer is not None for task in one.answer["tasks"])]
        workers = [{"worker": self._workers.own, "problem": self._ends.problem},
                   *({"worker": one.worker, "problem": one.problem} for one in told)]  # fmt: skip
        return {
            "app": self._app.conf.id,
            "broker": "; ".join(_host(str(url)) for url in self._app.conf.broker),
            "now": self._inspector.now_ms(),
            "ready": self._inspector.ready,
            "workers": workers,
            "graph": graph_of(self._inspector.groups),
            "tasks": sorted(tasks, key=lambda task: (task["group"], task["partition"])),
            "groups": {name: group.plan.partitions for name, group in self._inspector.groups.items()},
            "tables": self._tables.declared(),
        }

    async def _own(self) -> list[dict[str, Any]]:
        ends = await self._ends.get()
        now_ms = self._inspector.now_ms()
        return [_task(task, self._workers.own, now_ms) for task in self._inspector.tasks(ends)]


def _task(task: TaskFacts, worker: str, now_ms: int) -> dict[str, Any]:
    watermark = task.watermark
    special = {NO_WATERMARK: "none yet", END_OF_TIME: "end of input"}.get(watermark) if watermark is not None else None
    known = watermark is not None and special is None
    return {
        "group": task.group, "partition": task.partition, "worker": worker, "phase": task.phase, "lag": task.lag,
        "watermark": watermark if known else None,
        "watermark_age_ms": now_ms - watermark if known and watermark is not None else None,
        "watermark_note": special,
        "epoch": task.epoch, "incarnation": task.incarnation, "commit_age_ms": task.commit_age_ms,
        "commits": task.commits, "restarts": task.restarts, "problem": task.problem,
        "records": task.counters.records, "duplicates": task.counters.duplicates, "filtered": task.counters.filtered,
        "dead": sum(task.counters.dead.values()), "late": sum(task.counters.late.values()),
        "reasons": plain(task.counters.dead), "late_by_table": plain(task.counters.late),
        "sinks": [{"name": sink.name, "table": sink.table, "epochs_behind": sink.epochs_behind, "problem": sink.problem}
                  for sink in task.sinks],
        "restore": None if task.restore is None else {
            "topic": task.restore.topic, "position": int(task.restore.position), "target": int(task.restore.target),
            "records_per_s": round(task.restore.records_per_s)},
    }  # fmt: skip


def _host(url: str) -> str:
    """A broker's address without user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
