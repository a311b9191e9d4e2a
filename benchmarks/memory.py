"""python -m benchmarks memory --keys 10000000 --seconds 1800 --transport kafka

What a worker holds in memory: the most while it makes a table of so many rows, and whether it grows under full load.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from uuid import uuid4

from benchmarks import oracle, pipeline_job, results
from benchmarks.marks import TOPIC, Settings
from benchmarks.memory_load_job import POOL_RECORDS, RSS, SENT, LoadSettings
from benchmarks.memory_rows import live_rows, wrong_rows
from benchmarks.orders import SPAN_MS, orders
from benchmarks.parts import Log, Say, started_log, temporary_folder
from benchmarks.reports import Line, facts, parser
from benchmarks.reports import main as report
from benchmarks.soak import RSS_GROWTH_PCT_MAX, held_mb
from benchmarks.worker import measure
from streamproc.core.clock import Clock, SystemClock

__all__ = ["growth", "main"]

KEYS: Final = 10_000_000
SECONDS: Final = 600.0
"""Memory grows in steps until tables and allocators have found their size: shorter runs say little."""
COMMIT_INTERVAL_S: Final = 0.25
EXTRA_S: Final = 300.0
"""For start, warm-up and end of a run, beside its load."""
KEPT_ROUNDS: Final = 80
"""Of the load: windows are kept for seven days of event time, 84 rounds."""
SEGMENT_BYTES: Final = 64 << 20
"""Of the topic that is fed: what is deleted is to leave the disk too."""


def main(argv: Sequence[str]) -> int:
    """Exit code 1: a row is wrong, or memory grew by more than a soak may."""
    made = parser("memory", "Resident memory of a worker with much state, and under full load.")
    made.add_argument(
        "--keys", type=int, default=KEYS, help="rows of windowed state, nearly; 0: none (default %(default)s)"
    )
    made.add_argument("--seconds", type=float, default=SECONDS, help="of full load; 0: none (default %(default)s)")
    return report(made.parse_args(argv), run)


def run(given: argparse.Namespace, say: Say) -> Line:
    """Blocks for as long as asked and some minutes."""
    clock, line, wrong = SystemClock(), Line(name="memory", transport=given.transport), list[str]()
    with temporary_folder() as folder, started_log(given.transport, folder) as log:
        if given.keys:
            say(f"making a table of {given.keys:,} orders")
            wrong += _state(log, _told(log, folder / "keys", given.keys), line, clock)
        if given.seconds:
            say(f"loading a worker for {given.seconds:.0f} s")
            wrong += _load(log, _told(log, folder / "load", 1), given.seconds, line, clock)
        return {**line, **facts(log, wrong)}


def growth(looks: Sequence[tuple[float, float]], seconds: float) -> tuple[float, float, float]:
    """``looks``: seconds and MB. What was held after the warm-up, in the end (medians), and by how many % it grew."""
    begin, end = held_mb(looks, seconds)
    return begin, end, 100 * (end / begin - 1)


def _told(log: Log, folder: Path, records: int) -> Settings:
    number = uuid4().hex[:8]
    return Settings(log.broker, str(folder), f"benchmark-memory-{number}", f"{TOPIC}-{number}", records=records,
                    commit_interval_s=COMMIT_INTERVAL_S)  # fmt: skip


def _state(log: Log, told: Settings, line: Line, clock: Clock) -> list[str]:
    input_ = orders(told.records)
    asyncio.run(log.produce(told.topic, input_))
    measured = measure("memory_job", told, clock)
    wrong, rows = asyncio.run(_compared(log, told, input_.parquet))
    line.update(
        keys=rows, rss_mb=round(measured.rss_mb), keys_cpu_s=round(measured.cpu_s, 2),
        keys_per_cpu_s=round(rows / measured.cpu_s),
    )  # fmt: skip
    return wrong


async def _compared(log: Log, told: Settings, parquet: Path) -> tuple[list[str], int]:
    async with log.started() as transport:
        live = await live_rows(told, transport)
    return wrong_rows(told, live, parquet), sum(map(len, live))


def _load(log: Log, told: Settings, seconds: float, line: Line, clock: Clock) -> list[str]:
    loaded = LoadSettings(log.broker, told.folder, told.app_id, told.topic, records=told.records, seconds=seconds,
                          commit_interval_s=told.commit_interval_s)  # fmt: skip
    orders(POOL_RECORDS)  # made here, not by the worker
    asyncio.run(log.make_topic(told.topic, segment_bytes=str(SEGMENT_BYTES)))
    measured = measure("memory_load_job", loaded, clock, run_s_max=seconds + EXTRA_S)
    rounds = int((Path(told.folder) / SENT).read_text())
    lines = (Path(told.folder) / RSS).read_text().splitlines()
    looks = [(float(at), int(held) / 1e6) for at, held in map(str.split, lines)]
    first, last, pct = growth(looks, seconds)
    line.update(
        seconds=round(seconds), load_records=rounds * POOL_RECORDS,
        load_records_per_s=round(rounds * POOL_RECORDS / measured.wall_s), rss_mb_first=round(first, 1),
        rss_mb_last=round(last, 1), rss_growth_pct=round(pct, 1),
    )  # fmt: skip
    grown = [f"memory grew by {pct:.1f} %, more than {RSS_GROWTH_PCT_MAX:.0f} %"] if pct > RSS_GROWTH_PCT_MAX else []
    return [*grown, *asyncio.run(_differences(log, told, rounds))]


async def _differences(log: Log, told: Settings, rounds: int) -> list[str]:
    """Every row of the rounds that are kept whole, against as many shifted copies of one round's."""
    since = max(0, rounds - KEPT_ROUNDS)
    expected = {
        (country, start + round_ * SPAN_MS): (end + round_ * SPAN_MS, *values)
        for (country, start), (end, *values) in oracle.revenue_by_country(orders(POOL_RECORDS).parquet).items()
        for round_ in range(since, rounds)
    }
    columns = ("orders", "revenue")
    first_ms = min(start for _, start in expected)
    async with log.started() as transport:
        rows = await results.window_rows(pipeline_job, columns, told, transport)
    return oracle.differences("changelog", expected, (row for row in rows if row[0][1] >= first_ms))
