"""python -m benchmarks latency --seconds 30 --transport kafka

How long an order takes from just before it is sent to the moment when a reader of committed records has its row, at a
steady 1,000 a second: by an agent, and by a pipeline, whose rows take two commits, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from benchmarks import latency_job, oracle, results
from benchmarks.latency_job import FOUND, TABLE, LatencySettings, Way, probe
from benchmarks.latency_probe import Found, order_id
from benchmarks.marks import TOPIC
from benchmarks.parts import Log, Say, started_log, temporary_folder
from benchmarks.reports import Line, facts, parser
from benchmarks.reports import main as report
from benchmarks.worker import Measured, measure
from streamproc.core.clock import Clock, SystemClock

__all__ = ["main"]

SECONDS: Final = 30.0
RATE_PER_S: Final = 1_000
COMMIT_INTERVAL_S: Final = 1.0
"""An app's own, unless told otherwise."""
WAYS: Final[tuple[Way, ...]] = ("agent", "pipeline")


def main(argv: Sequence[str]) -> int:
    """Exit code 1: an order was lost or counted twice."""
    made = parser("latency", "From the sending of a record to its committed result.")
    made.add_argument("--seconds", type=float, default=SECONDS, help="of load (default %(default)s)")
    made.add_argument("--rate", type=int, default=RATE_PER_S, help="records a second (default %(default)s)")
    made.add_argument("--commit-interval", type=float, default=COMMIT_INTERVAL_S, metavar="S")
    return report(made.parse_args(argv), run)


def run(given: argparse.Namespace, say: Say) -> Line:
    """Blocks for some seconds more than twice the load."""
    clock, wrong = SystemClock(), list[str]()
    line = Line(name="latency", transport=given.transport, records_per_s=given.rate,
                commit_interval_ms=round(1000 * given.commit_interval))  # fmt: skip
    with temporary_folder() as folder, started_log(given.transport, folder) as log:
        for way in WAYS:
            say(f"{given.rate} orders a second through the {way}")
            number = uuid4().hex[:8]
            told = LatencySettings(
                log.broker, str(folder / way), f"benchmark-latency-{number}", f"{TOPIC}-{number}", records=1, way=way,
                seconds=given.seconds, rate_per_s=given.rate, commit_interval_s=given.commit_interval,
            )  # fmt: skip
            found, measured = asyncio.run(_measured(log, told, clock))
            line.update({
                f"{way}_p50_ms": found.p50_ms, f"{way}_p99_ms": found.p99_ms, f"{way}_max_ms": found.max_ms,
                f"{way}_records": found.counted, f"{way}_cpu_share": round(measured.cpu_s / measured.wall_s, 3),
            })  # fmt: skip
            wrong += asyncio.run(_wrong(log, told, found.sent))
        return {**line, **facts(log, wrong)}


async def _measured(log: Log, told: LatencySettings, clock: Clock) -> tuple[Found, Measured]:
    """An embedded log is the worker's alone while it runs: there the worker is its own probe."""
    await log.make_topic(told.topic)
    note = Path(told.folder) / FOUND
    worker = asyncio.create_task(asyncio.to_thread(measure, "latency_job", told, clock))
    if not told.broker.startswith("embedded"):
        found = await _probe(log, told, clock)
        note.write_bytes(found.encode())
    measured = await worker
    return msgspec.json.decode(note.read_bytes(), type=Found), measured


async def _probe(log: Log, told: LatencySettings, clock: Clock) -> Found:
    async with log.started() as transport:
        return await probe(told, transport, clock).run()


async def _wrong(log: Log, told: LatencySettings, sent: int) -> list[str]:
    """Every order must be in the table, once."""
    expected: oracle.Rows = {(order_id(number),): (1,) for number in range(sent)}
    async with log.started() as transport:
        if told.way == "agent":
            return oracle.differences(told.way, expected, await results.agent_rows(told, transport, TABLE))
        frames = await results.frames(latency_job, told, transport)
    rows = (((id_,), (count,)) for frame in frames for id_, count in frame.select("order_id", "orders").iter_rows())
    return oracle.differences(told.way, expected, rows)
