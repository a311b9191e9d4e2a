"""Which step of ours a sample belongs to: the innermost frame of its stack that is one of a step's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

__all__ = ["OTHER", "STEPS", "by_step", "step_of"]


class Step(NamedTuple):
    """A row of the table: its name, and the code that is it."""

    name: str
    places: tuple[str, ...]
    """Part of a file's path, or ``path:name`` for one function or class of the file."""


OTHER: Final = "event loop, all else"
_RECORD_BATCH: Final = "streamproc/avro/recordbatch.py"
_SOURCE: Final = "streamproc/operators/source.py"
STEPS: Final = (
    Step("the agent's own code", ("benchmarks/agent_job.py",)),
    Step("parse record batches", (f"{_RECORD_BATCH}:parse", f"{_RECORD_BATCH}:_Walk",
                                   f"{_RECORD_BATCH}:_Unpacked", f"{_RECORD_BATCH}:read_header",
                                   f"{_RECORD_BATCH}:BatchHeader")),
    Step("build record batches", (f"{_RECORD_BATCH}:split_build", f"{_RECORD_BATCH}:build",
                                  f"{_RECORD_BATCH}:build_columns", f"{_RECORD_BATCH}:_split",
                                  f"{_RECORD_BATCH}:_one", f"{_RECORD_BATCH}:_alone", f"{_RECORD_BATCH}:_packed",
                                  f"{_RECORD_BATCH}:_seal", f"{_RECORD_BATCH}:_size_bounds")),
    Step("fetch", ("streamproc/transport/kafka/fetch.py", "streamproc/transport/embedded/fetcher.py")),
    Step("decode to objects", ("streamproc/avro/rows.py",)),
    Step("decode to columns", ("streamproc/avro/",)),
    Step("expectations", (f"{_SOURCE}:_expected",)),
    Step("event time, watermarks", (f"{_SOURCE}:_timed", "streamproc/eventtime/watermark.py")),
    Step("dedupe", ("streamproc/operators/dedupe", "streamproc/core/hash128.py", f"{_SOURCE}:_DedupeStep")),
    Step("filter, derive", ("streamproc/operators/expressions.py", f"{_SOURCE}:_FilterStep", f"{_SOURCE}:_DeriveStep")),
    Step("windows, group, aggregate", ("streamproc/operators/accumulat", "streamproc/operators/groups.py",
                                       "streamproc/operators/kernels.py", "streamproc/eventtime/windows.py",
                                       f"{_SOURCE}:_WindowStep")),
    Step("partials: encode, decode", ("streamproc/operators/partials.py", "streamproc/operators/groupkeys.py")),
    Step("owner: merge, close windows", ("streamproc/operators/windowtable.py", "streamproc/operators/tablerows.py",
                                         "streamproc/operators/rowcache.py", "streamproc/operators/cellcolumns.py",
                                         "streamproc/operators/bytecolumns.py", "streamproc/operators/distinct.py",
                                         "streamproc/runtime/ownerwork.py")),
    Step("forward", ("streamproc/operators/forward.py",)),
    Step("sinks: rows", ("streamproc/runtime/sinkfeed.py", "streamproc/sinks/feed.py", "streamproc/sinks/shared.py")),
    Step("sinks: Postgres", ("streamproc/sinks/postgres", "/asyncpg/")),
    Step("sinks: Redis", ("streamproc/sinks/redis", "/redis/", "/hiredis/")),
    Step("RocksDB", ("streamproc/state/rocksdb.py",)),
    Step("table of objects", ("streamproc/state/objects.py", "streamproc/state/packing.py")),
    Step("overlay", ("streamproc/state/overlay.py",)),
    Step("changelog records", ("streamproc/state/changelog.py",)),
    Step("produce, commit", ("streamproc/transport/kafka/txn.py", "streamproc/transport/kafka/produce.py",
                             "streamproc/transport/embedded/log.py", "streamproc/runtime/epoch.py",
                             "streamproc/commit/")),
    Step("agent hand-out", ("streamproc/runtime/agentwork.py", "streamproc/runtime/surface.py")),
    Step("source program, the rest", (_SOURCE, "streamproc/runtime/sourcework.py")),
    Step("network client", ("streamproc/transport/", "/aiokafka/", "asyncio/selector_events.py:_SelectorSocketTransport")),
    Step("tasks, pump, timers", ("streamproc/runtime/",)),
)  # fmt: skip


def step_of(stack: Sequence[str]) -> str:
    """``stack``: frames as a `Sampler` names them, outermost first."""
    for frame in reversed(stack):
        names, path = _parsed(frame)
        for step in STEPS:
            if any(_is(place, path, names) for place in step.places):
                return step.name
    return OTHER


def by_step(records: Iterable[tuple[Sequence[str], float]]) -> dict[str, float]:
    """Seconds by step, in the order of `STEPS`."""
    found = dict.fromkeys([*(step.name for step in STEPS), OTHER], 0.0)
    for stack, seconds in records:
        found[step_of(stack)] += seconds
    return {name: seconds for name, seconds in found.items() if seconds}


def _parsed(frame: str) -> tuple[frozenset[str], str]:
    """Names of function and class, and the path, of ``Class.function NUL path NUL line``."""
    name, path, _ = frame.split("\0", 2)
    return frozenset(name.split(".")), path


def _is(place: str, path: str, names: frozenset[str]) -> bool:
    part, _, name = place.partition(":")
    return part in path and (not name or name in names)
