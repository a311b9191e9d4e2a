"""What a table's rows depend on, as plain data kept in the commit record: incompatible code refuses to start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Final

import msgspec

from streamproc.core.errors import UserError
from streamproc.operators.plan import Dedupe, TablePlan

__all__ = ["ObjectTable", "fingerprint", "fingerprint_of", "require_same"]

FORMAT: Final = 1
_MAY_SHRINK: Final = frozenset({"allowed_lateness_ms"})
"""Longer lateness would let records into windows that are already final or purged; shorter only closes them earlier."""


@dataclass(frozen=True)
class ObjectTable:
    """A table of per-record agents: Python keys and values, so nothing but its name and size can be told."""

    name: str
    partitions: int


@singledispatch
def fingerprint_of(plan: object) -> dict[str, Any]:
    """What defines the plan's rows, in JSON's own types. What may change freely (retention, filters and columns applied
    at reading, places in files) is not in it."""
    raise TypeError(f"{type(plan).__name__} defines no state")


@fingerprint_of.register
def _table(plan: TablePlan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "window table",
        "table": plan.name,
        "keys": [[name, str(dtype)] for name, dtype in plan.keys.items()],
        "window": {"tumbling_ms": plan.window.size_ms, "offset_ms": plan.window.offset_ms},
        "allowed_lateness_ms": plan.allowed_lateness_ms,
        "aggregates": {
            name: [agg.kind] if agg.column is None else [agg.kind, agg.column, str(plan.inputs[agg.column])]
            for name, agg in plan.aggs.items()
        },
        "aggregates_order": list(plan.aggs),
        "partitions": plan.partitions,
    }


@fingerprint_of.register
def _dedupe(plan: Dedupe) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "dedupe",
        "table": plan.name,
        "columns": list(plan.columns),
        "within_ms": plan.within_ms,
    }


@fingerprint_of.register
def _objects(plan: ObjectTable) -> dict[str, Any]:
    return {"format": FORMAT, "kind": "object table", "table": plan.name, "partitions": plan.partitions}


def fingerprint(plan: object) -> str:
    """Canonical JSON of `fingerprint_of`: equal text, equal rows."""
    return msgspec.json.encode(fingerprint_of(plan), order="sorted").decode()


def require_same(old: Mapping[str, Any] | None, new: Mapping[str, Any], where: str | None = None) -> None:
    """Refuse rows of plan ``old`` under plan ``new``: `UserError` with the table, what changed, and the way out.

    ``old`` None: the table has no rows yet. ``where``: application or place in the user's file, for the message.
    """
    if old is None:
        return
    changed = [f"{name} was {_shown(old, name)} and is {_shown(new, name)}" for name in _changed(old, new)]
    if changed:
        table = new.get("table") or old.get("table")
        raise UserError(
            f"Table {table!r} was built by other code: {'; '.join(changed)}. Its rows would be wrong.",
            remedy=f"Undo the change, rename the table, or give its rows up with `streamproc reset MODULE --table {table}`.",
            where=where,
        )


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [*old, *(name for name in new if name not in old)]
    return [name for name in names if old.get(name) != new.get(name) and not _shrinks(name, old, new)]


def _shrinks(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return name in _MAY_SHRINK and name in old and name in new and bool(new[name] <= old[name])


def _shown(form: Mapping[str, Any], name: str) -> str:
    return msgspec.json.encode(form[name]).decode() if name in form else "absent"
