"""The pipelines as a graph: source, steps, tables, sinks; agents with their topics and tables. Made from the plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamproc.eventtime.spec import FOREVER
from streamproc.operators.plan import Dedupe, Expect, Filter, Node, Step, TablePlan, WithColumns
from streamproc.runtime.topology import Group

__all__ = ["graph_of", "span"]

_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1))


def span(ms: int) -> str:
    """A duration as a person would write it: ``5m``, ``1h 30m``."""
    parts = []
    for name, size in _UNITS:
        count, ms = divmod(ms, size)
        if count:
            parts.append(f"{count}{name}")
    return " ".join(parts[:2]) or "0s"


class _Drawing:
    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.edges: list[dict[str, str]] = []

    def add(self, kind: str, name: str, label: str, detail: str = "", **more: Any) -> str:
        key = f"{kind}:{name}"
        self.nodes.setdefault(key, {"id": key, "kind": kind, "label": label, "detail": detail, **more})
        return key

    def join(self, start: str, end: str) -> None:
        edge = {"from": start, "to": end}
        if edge not in self.edges:
            self.edges.append(edge)


def graph_of(groups: Mapping[str, Group]) -> dict[str, Any]:
    """Nodes ``{id, kind, label, detail, …}`` and edges ``{from, to}``; kinds: source, step, agent, table, sink.

    A node says in ``group`` whose tasks do its work.
    """
    drawing = _Drawing()
    for name, group in groups.items():
        if group.source is not None:
            plan = group.source
            source = drawing.add("source", plan.topic, plan.topic, f"time: {plan.event_time.column}", group=name)
            _walk(drawing, plan.root, source, f"{plan.name}/", name)
        elif group.table is None:
            _agents(drawing, group)
    for group in groups.values():
        for table in group.plan.tables:
            for use in table.sinks:
                sink = drawing.add("sink", use.sink.name, use.sink.name, f"emits {use.emit}")
                drawing.join(f"table:{table.name}", sink)
    return {"nodes": list(drawing.nodes.values()), "edges": drawing.edges}


def _walk(drawing: _Drawing, node: Node, before: str, path: str, group: str) -> None:
    if node.step is not None:
        kind, detail = _told(node.step)
        step = drawing.add("step", path, kind, detail, group=group)
        drawing.join(before, step)
        before = step
    for table in node.tables:
        at = drawing.add("table", table.name, table.name, _table_told(table), group=f"table-{table.name}")
        drawing.join(before, at)
    for topic in node.outputs:
        drawing.join(before, drawing.add("sink", f"topic {topic}", topic, "topic"))
    for number, child in enumerate(node.children):
        _walk(drawing, child, before, f"{path}{number}/", group)


def _told(step: Step) -> tuple[str, str]:
    match step:
        case Expect(rules=rules):
            return "expect", ", ".join(rules)
        case Dedupe(columns=columns, within_ms=within_ms):
            return "dedupe", f"{', '.join(columns)} within {span(within_ms)}"
        case Filter(predicate=predicate):
            return "filter", ", ".join(predicate.meta.root_names())
        case WithColumns(columns=columns):
            return "with columns", ", ".join(columns)


def _table_told(plan: TablePlan) -> str:
    keys = ", ".join(plan.keys)
    return f"by {keys}" if plan.window == FOREVER else f"{span(plan.window.size_ms)} by {keys}"


def _agents(drawing: _Drawing, group: Group) -> None:
    """Any agent of the group may write any of its tables."""
    for name, topics in group.plan.agents.items():
        agent = drawing.add("agent", name, name.rpartition(".")[2], "per record", group=group.plan.name)
        for topic in topics:
            drawing.join(drawing.add("source", topic, topic), agent)
        for table in group.plan.tables:
            at = drawing.add("table", table.name, table.name, "written by agents", group=group.plan.name)
            drawing.join(agent, at)
