"""One benchmark from its input to its line: log and sinks started, orders produced, worker measured, results compared."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from benchmarks.compare import compare
from benchmarks.marks import TOPIC, Settings
from benchmarks.orders import Orders, orders
from benchmarks.parts import FULL_RECORDS, Log, Say, started_log, started_sinks, temporary_folder
from benchmarks.reports import Line, facts
from benchmarks.worker import Measured, measure
from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import UserError

__all__ = ["COMMITS_MIN", "NAMES", "TooFewCommits", "commit_interval_s", "refuse_too_few", "require_commits", "run"]

NAMES: Final = ("pipeline", "distinct", "count", "forward", "agent")
WITH_SINKS: Final = ("pipeline", "distinct")
COMMITS_MIN: Final = 20
COMMIT_INTERVAL_S: Final = 0.25
"""Of a run of `FULL_RECORDS`; shorter ones commit more often, so that there is something to commit in time."""
COMMIT_INTERVAL_S_MIN: Final = 0.02
FORWARD_INTERVAL_S: Final = 0.08
"""The same for `forward`, whose worker needs a second or two for `FULL_RECORDS`; of longer runs it grows, up to `_MAX`."""
FORWARD_INTERVAL_S_MAX: Final = 1.0
FETCH_BYTES_MIN: Final = 128 * 1024
WARM_RECORDS: Final = 20_000


class TooFewCommits(UserError):
    """What does not commit is not exactly-once: the figures of such a run say nothing."""


def run(
    name: str, records: int, transport: str, *, clock: Clock, interval_s: float | None = None, profile: str = "",
    say: Say = lambda what: None,
) -> Line:  # fmt: skip
    """Run benchmark ``name`` and return its line. Blocks for minutes; ``say`` is told what goes on.

    Raises `TooFewCommits` when the worker committed fewer than `COMMITS_MIN` epochs of orders, `UserError` when it
    failed. Wrong results are no exception: the line says ``correct: false`` and what differs.
    """
    say(f"making {records:,} orders")
    input_ = orders(records)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        say(f"starting {transport}")
        log = stack.enter_context(started_log(transport, folder))
        number = uuid4().hex[:8]  # a broker that outlives the run may hold topics of others
        told = Settings(
            broker=log.broker, folder=str(folder / "state"), app_id=f"benchmark-{name}-{number}",
            topic=f"{TOPIC}-{number}", records=records,
            commit_interval_s=commit_interval_s(records, name) if interval_s is None else interval_s, profile=profile,
            fetch_bytes_max=fetch_bytes_max(records),
        )  # fmt: skip
        _warm_up(name, told, log, folder, clock, say)
        if name in WITH_SINKS:
            told = stack.enter_context(started_sinks(told, folder))
        say(f"producing {records:,} orders")
        asyncio.run(log.produce(told.topic, input_))
        say("running the worker")
        measured = measure(f"{name}_job", told, clock)
        say("comparing the results")
        wrong = asyncio.run(_wrong(name, told, log, input_))
    return _line(name, transport, told, measured, wrong, log)


def commit_interval_s(records: int, name: str = "") -> float:
    """Between two commits of a task, so that there are `COMMITS_MIN` of them, and to spare, in a run of `name`."""
    most_s, full_s = COMMIT_INTERVAL_S, COMMIT_INTERVAL_S
    if name == "forward":
        most_s, full_s = FORWARD_INTERVAL_S_MAX, FORWARD_INTERVAL_S
    return max(COMMIT_INTERVAL_S_MIN, min(round(full_s * records / FULL_RECORDS, 3), most_s))


def fetch_bytes_max(records: int) -> int:
    """In proportion, as the interval: a short run is to have as many epochs."""
    return min(
        max(limits.FETCH_PARTITION_BYTES_MAX * records // FULL_RECORDS, FETCH_BYTES_MIN),
        limits.FETCH_PARTITION_BYTES_MAX,
    )


def require_commits(name: str, measured: Measured) -> int:
    """How many epochs of orders were committed; raises `TooFewCommits` below `COMMITS_MIN`.

    Tasks that merge what others have shipped commit too, but only those that read orders count.
    """
    commits = sum(count for task, count in measured.epochs.items() if not task.startswith("table-"))
    refuse_too_few(name, commits, measured.wall_s)
    return commits


def refuse_too_few(name: str, commits: int, wall_s: float) -> None:
    """Raises `TooFewCommits` below `COMMITS_MIN`."""
    if commits < COMMITS_MIN:
        raise TooFewCommits(
            f"The worker of {name} committed {commits} times in {wall_s:.2f} s, fewer than {COMMITS_MIN}: the run is "
            "refused.",
            remedy="Give it more records, or a shorter --commit-interval.",
        )


def _warm_up(name: str, told: Settings, log: Log, folder: Path, clock: Clock, say: Say) -> None:
    """A short run of its own, so that compiled code is in its cache and files are in the machine's memory."""
    say("warming up")
    warm = msgspec.structs.replace(
        told, app_id=f"{told.app_id}-warm", topic=f"{told.topic}-warm", records=WARM_RECORDS, folder=str(folder / "warm"),
        profile="",
    )  # fmt: skip
    asyncio.run(log.produce(warm.topic, orders(WARM_RECORDS)))
    measure(f"{name}_job", warm, clock)


async def _wrong(name: str, told: Settings, log: Log, input_: Orders) -> list[str]:
    async with log.started() as transport:
        return await compare(name, told, transport, input_)


def _line(name: str, transport: str, told: Settings, measured: Measured, wrong: list[str], log: Log) -> Line:
    return {
        "name": name,
        "transport": transport,
        "records": told.records,
        "wall_s": round(measured.wall_s, 3),
        "worker_cpu_s": round(measured.cpu_s, 3),
        "records_per_worker_cpu_s": round(told.records / measured.cpu_s),
        "rss_mb": round(measured.rss_mb),
        "commits": require_commits(name, measured),
        "commits_all_tasks": sum(measured.epochs.values()),
        "commit_interval_s": told.commit_interval_s,
        "task_restarts": measured.restarts,
        **({"profiled": True} if told.profile else {}),
        **facts(log, wrong),
    }
