"""python -m benchmarks soak --seconds 600

One worker whose Postgres takes less than a quarter of what comes in, for as long as asked: its memory must stay flat, its
queues bounded, its tasks visibly held. Then the line is made fast again, and both sinks must hold every order once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import aiohttp
import msgspec
import psutil  # type: ignore[import-untyped]

from benchmarks.marks import Settings
from benchmarks.parts import TRANSPORTS, Log, Say, started_log, started_sinks, temporary_folder
from benchmarks.soak_job import PARTITIONS, RATE_PER_S, SENT, TABLE, WINDOW_MS, order
from streamproc.core import limits
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import StreamprocError, UserError
from streamproc.testing.servers import Cable

__all__ = ["RSS_GROWTH_PCT_MAX", "Look", "Verdict", "judge", "main"]

RSS_GROWTH_PCT_MAX: Final = 10.0
"""From the end of the warm-up to the end of the load; a leak of one epoch in a hundred would show as more."""
WARM_UP_SHARE: Final = 0.4
"""Of the run: code is compiled, queues, caches and the inboxes of the held tasks (`TASK_INBOX_BYTES_MAX` each) fill."""
END_SHARE: Final = 0.1
"""Of the run, at both ends of what is compared: single looks jump with the garbage collector."""
SLOW_BYTES_PER_S: Final = 20_000
"""What a connection to Postgres carries: less than a quarter of what the orders make."""
LOOK_S: Final = 2.0
START_S_MAX: Final = 120.0
DRAIN_S_MAX: Final = 600.0
"""For what is left when the line is fast again."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
Rows = dict[tuple[int, int], tuple[int, int]]
"""(user, window start in ms) -> (orders, amount)"""


@dataclass(frozen=True)
class Look:
    """What one look at the worker showed."""

    at_s: float
    rss_mb: float
    queued: int
    """Epochs that wait for a sink: the most of any task."""
    phases: tuple[str, ...]
    """Of the tasks that have sinks."""
    problem: str | None
    caught_up: bool
    """Nothing is left to read, and the sinks have all of it."""


@dataclass(frozen=True)
class Verdict:
    """What the looks and the sinks say; `line` ends the run."""

    seconds: float
    rss_mb_first: float
    rss_mb_last: float
    lost: int
    wrong: int
    held_pct: float
    queued_max: int

    @property
    def growth_pct(self) -> float:
        return 100 * (self.rss_mb_last / self.rss_mb_first - 1)

    @property
    def faults(self) -> list[str]:
        """Why the run fails, in words."""
        found = []
        if self.growth_pct > RSS_GROWTH_PCT_MAX:
            found.append(f"memory grew by {self.growth_pct:.1f} %, more than {RSS_GROWTH_PCT_MAX:.0f} %")
        if self.lost or self.wrong:
            found.append(f"{self.lost} rows are missing in the sinks and {self.wrong} are wrong")
        if not self.held_pct:
            found.append("no task was ever held: the sink was not slow")
        if self.queued_max > limits.SINK_QUEUE_EPOCHS_MAX + 1:  # the one that is committed as the queue fills
            found.append(f"{self.queued_max} epochs waited for a sink")
        return found

    @property
    def line(self) -> str:
        return (
            f"soak seconds={self.seconds:.0f} rss_mb_first={self.rss_mb_first:.1f} rss_mb_last={self.rss_mb_last:.1f} "
            f"rss_growth_pct={self.growth_pct:.1f} lost={self.lost} wrong={self.wrong} held_pct={self.held_pct:.0f} "
            f"queued_max={self.queued_max}"
        )


def held_mb(looks: Sequence[tuple[float, float]], seconds: float) -> tuple[float, float]:
    """``looks``: seconds and MB. What was held after the warm-up and in the end (medians). Raises `UserError` when one of
    them was never looked at."""
    first = [mb for at_s, mb in looks if seconds * WARM_UP_SHARE <= at_s < seconds * (WARM_UP_SHARE + END_SHARE)]
    last = [mb for at_s, mb in looks if seconds * (1 - END_SHARE) <= at_s <= seconds]
    if not first or not last:
        raise UserError(
            f"{seconds:g} s are too short to say whether memory grows.", remedy="Give it --seconds 60 or more."
        )
    return statistics.median(first), statistics.median(last)


def judge(looks: Sequence[Look], seconds: float, differences: Mapping[str, tuple[int, int]]) -> Verdict:
    """``differences``: rows missing and wrong by sink. Looks at the load only, not at the draining behind it."""
    first_mb, last_mb = held_mb([(look.at_s, look.rss_mb) for look in looks], seconds)
    warm = [look for look in looks if seconds * WARM_UP_SHARE <= look.at_s <= seconds]
    return Verdict(
        seconds,
        first_mb,
        last_mb,
        sum(lost for lost, _ in differences.values()),
        sum(wrong for _, wrong in differences.values()),
        100 * sum("held" in look.phases for look in warm) / len(warm),
        max(look.queued for look in looks),
    )


def main(argv: Sequence[str]) -> int:
    """Exit code 1: memory grew, a row is missing or wrong, or the worker was never held up."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description="Memory of a worker on a slow sink.")
    parser.add_argument("--seconds", type=float, default=600.0, help="of load (default %(default)s)")
    parser.add_argument("--transport", choices=TRANSPORTS, default="embedded")
    given = parser.parse_args(argv)
    try:
        with temporary_folder() as folder, started_log(given.transport, folder) as log:
            verdict = _run(log, folder, given.seconds, lambda text: print(text, flush=True))
    except StreamprocError as failure:
        print(failure, file=sys.stderr)
        return 1
    for fault in verdict.faults:
        print(f"soak failed: {fault}", flush=True)
    print(verdict.line, flush=True)
    return 1 if verdict.faults else 0


def _run(log: Log, folder: Path, seconds: float, say: Say) -> Verdict:
    told = Settings(
        log.broker, folder=str(folder / "state"), app_id=f"soak-{uuid4().hex[:8]}", records=round(seconds * RATE_PER_S),
        partitions=PARTITIONS, commit_interval_s=0.5,
    )  # fmt: skip
    with started_sinks(told, folder) as told:
        return asyncio.run(_Soak(told, folder, seconds, say).run())


@dataclass
class _Soak:
    told: Settings
    folder: Path
    seconds: float
    say: Say
    clock: Clock = field(default_factory=SystemClock)
    looks: list[Look] = field(default_factory=list)

    async def run(self) -> Verdict:
        port = _free_port()
        async with self._slow_postgres() as (cable, dsn):
            worker = self._start(msgspec.structs.replace(self.told, postgres=dsn), port)
            try:
                await self._load(worker, port)
                cable.bytes_per_s = None
                await self._drain(worker, port)
            finally:
                worker.terminate()
                try:
                    await asyncio.to_thread(worker.wait, 30)
                finally:
                    worker.kill()
        expected = await asyncio.to_thread(_expected, self._sent())
        found = {"postgres": await _postgres(self.told.postgres), "redis": await _redis(self.told.redis)}
        return judge(self.looks, self.seconds, {name: _differences(expected, rows) for name, rows in found.items()})

    @asynccontextmanager
    async def _slow_postgres(self) -> AsyncIterator[tuple[Cable, str]]:
        """A DSN that leads to the real server over a thin line."""
        server = Path(self.told.postgres.partition("?host=")[2]) / ".s.PGSQL.5432"
        own = self.folder / "thin"
        own.mkdir()
        async with Cable(server, own / server.name, bytes_per_s=SLOW_BYTES_PER_S) as cable:
            yield cable, f"postgresql://postgres@/postgres?host={own}"

    def _start(self, told: Settings, port: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "faust",
            "-A",
            "benchmarks.soak_job",
            "worker",
            "-l",
            "warn",
            "--web-port",
            str(port),
        ]
        with (self.folder / "worker.out").open("wb") as out:
            return subprocess.Popen(
                command, cwd=Path(__file__).resolve().parent.parent, env={**os.environ, **told.environment()}, stdout=out,
                stderr=out,
            )  # fmt: skip

    async def _load(self, worker: subprocess.Popen[bytes], port: int) -> None:
        ready_by = self.clock.monotonic_s() + START_S_MAX
        while await self._look(worker, port, 0.0) is None:
            if self.clock.monotonic_s() > ready_by:
                raise UserError(f"The worker did not start in {START_S_MAX:.0f} s.", remedy=self._words())
            await self.clock.sleep(0.2)
        began = self.clock.monotonic_s()
        while (at_s := self.clock.monotonic_s() - began) < self.seconds:
            await self._note(worker, port, at_s)
            await self.clock.sleep(min(LOOK_S, self.seconds - at_s))

    async def _drain(self, worker: subprocess.Popen[bytes], port: int) -> None:
        began = self.clock.monotonic_s()
        while (took_s := self.clock.monotonic_s() - began) < DRAIN_S_MAX:
            look = await self._note(worker, port, self.seconds + took_s)
            if look is not None and look.caught_up and (Path(self.told.folder) / SENT).exists():
                return
            await self.clock.sleep(LOOK_S)
        self.say(f"not everything was in the sinks {DRAIN_S_MAX:.0f} s after the line was fast again: {self._words()}")

    async def _note(self, worker: subprocess.Popen[bytes], port: int, at_s: float) -> Look | None:
        look = await self._look(worker, port, at_s)
        if look is not None:
            self.looks.append(look)
            self.say(f"{look.at_s:6.0f} s  {look.rss_mb:6.1f} MB  {look.queued:2d} epochs queued  {' '.join(look.phases)}  "
                     f"{look.problem or ''}")  # fmt: skip
        return look

    async def _look(self, worker: subprocess.Popen[bytes], port: int, at_s: float) -> Look | None:
        """Memory by the operating system, the rest by the web view, as a person would see it; None: no answer yet."""
        if worker.poll() is not None:
            raise UserError(f"The worker ended with code {worker.returncode}.", remedy=self._words())
        try:
            timeout = aiohttp.ClientTimeout(total=limits.WEB_SEND_TIMEOUT_S)
            address = f"http://127.0.0.1:{port}/api/tasks"
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(address) as answer:
                told: Any = await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None
        tasks = told["tasks"]
        owners = [task for task in tasks if task["sinks"]]
        queued = [sink["epochs_behind"] for task in owners for sink in task["sinks"]]
        if len(queued) < 2 * PARTITIONS:
            return None
        rss = psutil.Process(worker.pid).memory_info().rss / 1e6
        return Look(
            at_s, rss, max(queued), tuple(task["phase"] for task in owners),
            next((task["problem"] for task in owners if task["problem"]), None),
            not any(queued) and not any(task["lag"] != 0 for task in tasks),
        )  # fmt: skip

    def _sent(self) -> int:
        try:
            sent = json.loads((Path(self.told.folder) / SENT).read_text())["orders"]
        except FileNotFoundError:
            raise UserError("The worker did not send all orders in time.", remedy=self._words()) from None
        return int(sent) // PARTITIONS

    def _words(self) -> str:
        return "The end of its output:\n" + (self.folder / "worker.out").read_text(errors="replace")[-3000:]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _expected(count: int) -> Rows:
    """One computation over the whole input."""
    orders: Counter[tuple[int, int]] = Counter()
    amounts: Counter[tuple[int, int]] = Counter()
    for partition in range(PARTITIONS):
        for number in range(count):
            user, at, amount = order(partition, number)
            row = (user, at // WINDOW_MS * WINDOW_MS)
            orders[row] += 1
            amounts[row] += amount
    return {row: (orders[row], amounts[row]) for row in orders}


def _differences(expected: Rows, found: Rows) -> tuple[int, int]:
    """Rows that are missing; rows that are not as expected, or not expected at all."""
    missing = sum(1 for row in expected if row not in found)
    return missing, sum(1 for row, values in found.items() if expected.get(row) != values)


async def _postgres(dsn: str) -> Rows:
    import asyncpg

    connection = await asyncpg.connect(dsn)
    try:
        found = await connection.fetch(f"SELECT user_id, window_start, orders, amount FROM {TABLE}")
    finally:
        await connection.close()
    return {
        (user, (start - _EPOCH) // timedelta(milliseconds=1)): (orders, int(amount))
        for user, start, orders, amount in found
    }


async def _redis(url: str) -> Rows:
    from redis.asyncio import Redis

    rows: Rows = {}
    client = Redis.from_url(url)
    try:
        async for key in client.scan_iter(match=f"{{{TABLE}:*}}:*:*", count=1_000):
            _, user, start = key.decode().rsplit(":", 2)
            orders, amount = await client.hmget(key, ["orders", "amount"])
            rows[int(user), int(start)] = (int(orders or 0), int(float(amount or 0)))
    finally:
        await client.aclose()
    return rows
