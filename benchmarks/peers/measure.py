"""One run of one job on one peer: orders produced, worker measured, results compared."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from benchmarks import oracle
from benchmarks.orders import DISORDER_MS, PARTITIONS, SCHEMA_ID, SPAN_MS, Orders
from benchmarks.peers import check, log
from benchmarks.peers.engine import Engine
from benchmarks.peers.jobs.told import Told
from benchmarks.peers.log import Output
from benchmarks.peers.process import Process, Sample, last_busy, started
from benchmarks.reports import machine
from streamproc.core.clock import Clock
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import Transport
from streamproc.transport.kafka import KafkaTransport

__all__ = ["run", "told_of"]

RUN_S_MAX: Final = 1_800.0
POLL_S: Final = 0.25
QUIET_S: Final = 4.0
"""So long the process must have been idle to have nothing left to do; it may only have been kept from the CPU."""
SILENT_S: Final = 30.0
"""So long for one whose results are not all there: then they will not come, and the run is wrong."""
COMMIT_MS: Final = 1_000
GRACE_MS: Final = SPAN_MS + 300_000
REMEMBERED_MS: Final = 3_600_000
WATERMARK_MS: Final = 2 * DISORDER_MS
CLOSE_S: Final = 4.0
"""Some engines close windows only at a record that comes a while after another: then more are sent."""
CLOSES_MAX: Final = 4
SETTLE_S: Final = 1.5
"""After the last expected window: one that is written twice would come in this time."""


@dataclass(frozen=True)
class Cost:
    wall_s: float
    cpu_s: float


class Run:
    """The state of a run. The worker's samples are taken every `POLL_S`, whatever is waited for."""

    def __init__(self, engine: Engine, told: Told, input_: Orders, transport: Transport, clock: Clock) -> None:
        self.engine, self.told, self.input, self.transport, self.clock = engine, told, input_, transport, clock
        self.samples: list[Sample] = []
        self.windows: list[check.Window] = []
        self.commits = 0
        """So often a partition's committed position was seen to have moved; the workers commit less often than is looked."""
        self._at: Mapping[TopicPartition, Offset] = {}

    async def follow(self, worker: Process) -> Cost:
        """From the first record until everything is done: what that cost. Raises `UserError` when it does not get there."""
        await self._until(worker, self._all_committed)
        windows = self.told.job == "pipeline"
        if windows and self.engine.updates:
            await self._follow_updates(worker)
            end = self.samples[-1]
        elif windows or self.engine.offsets_lag:
            await self._until(worker, self._quiet)
            end = last_busy(self.samples)
        else:
            end = self.samples[-1]
        first = worker.first
        assert first is not None  # `_all_committed` waits for it
        cost = Cost(end.at_s - first.at_s, end.cpu_s - first.cpu_s)
        if not windows or self.engine.updates:
            return cost
        close = await self._close(worker)
        return Cost(cost.wall_s + close.wall_s, cost.cpu_s + close.cpu_s)

    def warm_records_per_cpu_s(self, worker: Process, cost: Cost) -> float | None:
        """Of the second half of the orders. None: it is no different, or was never seen between two commits."""
        if not self.engine.warms_up:
            return None
        assert worker.first is not None
        half = next(sample for sample in self.samples if sample.committed >= len(self.input) / 2)
        rest, cpu = len(self.input) - half.committed, worker.first.cpu_s + cost.cpu_s - half.cpu_s
        return rest / cpu if rest > 0.1 * len(self.input) and cpu > 0 else None

    async def _until(self, worker: Process, done: Callable[[Process], Awaitable[bool]]) -> None:
        until = self.clock.monotonic_s() + RUN_S_MAX
        while True:
            before, self._at = self._at, await log.committed(self.transport, self.told)
            self.commits += sum(at > before.get(tp, 0) for tp, at in self._at.items())
            self.samples.append(worker.sample(sum(self._at.values())))
            if await done(worker):
                return
            if self.clock.monotonic_s() > until:
                raise worker.give_up(
                    f"Not done in {RUN_S_MAX:.0f} s: {self.samples[-1].committed:,} records committed."
                )
            await self.clock.sleep(POLL_S)

    async def _all_committed(self, worker: Process) -> bool:
        return worker.first is not None and self.samples[-1].committed >= len(self.input)

    async def _quiet(self, worker: Process) -> bool:
        return self.clock.monotonic_s() - last_busy(self.samples).at_s > QUIET_S

    async def _follow_updates(self, worker: Process) -> None:
        """Until the last updates count every order. Source positions do not tell: what is behind a repartition topic may
        still have much to do."""
        wanted = sum(count for _, count, _ in oracle.revenue_by_country(self.input.parquet).values())
        output = Output(self.transport, self.told.output, self.told.partitions)

        async def published(worker: Process) -> bool:
            await self._read_windows(output)
            if sum(count for count, _ in dict(self.windows).values()) >= wanted:
                return True
            return self.clock.monotonic_s() - last_busy(self.samples).at_s > SILENT_S

        await self._until(worker, published)

    async def _read_windows(self, output: Output) -> None:
        self.windows += [check.window(value) for _, value in await output.more() if value is not None]

    async def _close(self, worker: Process) -> Cost:
        """Close the windows: what that cost beyond the waiting before it."""
        open_ = set(oracle.revenue_by_country(self.input.parquet))
        output = Output(self.transport, self.told.output, self.told.partitions)
        before, sent = self.samples[-1], 0

        async def closed(worker: Process) -> bool:
            nonlocal sent
            if self.clock.monotonic_s() - before.at_s >= sent * CLOSE_S and sent < CLOSES_MAX:
                await log.close_windows(self.transport, self.told, plain=self.engine.plain, nth=sent)
                sent += 1
            await self._read_windows(output)
            open_.difference_update(identity for identity, _ in self.windows)
            return not open_ or self.clock.monotonic_s() - before.at_s > (CLOSES_MAX + 2) * CLOSE_S

        await self._until(worker, closed)
        last = self.samples[-1]
        await self.clock.sleep(SETTLE_S)
        await self._read_windows(output)
        return Cost(last.at_s - before.at_s, last.cpu_s - before.cpu_s)

    async def wrong(self, bootstrap: str) -> list[str]:
        """Where the results differ from the oracle's."""
        match self.told.job:
            case "pipeline":
                return check.windows(self.input, self.windows, updates=self.engine.updates)
            case "count":
                topic = await log.topic_that_begins(bootstrap, self.engine.counts_topic(self.told))
                rows = await self._read(topic)
                return check.counts(self.input, (self.engine.count(key, value) for key, value in rows))
            case _:
                values = (value for _, value in await self._read(self.told.output))
                return check.forwarded(self.input, values, len(self.told.head) if self.engine.plain else 0)

    async def _read(self, topic: str) -> list[tuple[bytes, bytes]]:
        output = Output(self.transport, topic, self.told.partitions)
        return [(key or b"", value) for key, value in await output.more() if value is not None]


async def run(
    engine: Engine, job: str, input_: Orders, bootstrap: str, folder: Path, clock: Clock, say: Callable[[str], None]
) -> dict[str, Any]:
    """The run's line. Blocks for minutes; ``say`` is told what goes on.

    Raises `UserError` when the worker ended or did not finish. Wrong results are no exception: the line says
    ``correct: false`` and what differs.
    """
    told = told_of(job, engine.name, bootstrap, folder)
    transport = KafkaTransport(bootstrap, clock, client_id="benchmarks")
    await transport.start()
    try:
        say(f"producing {len(input_):,} orders")
        await log.fill(transport, told, input_, plain=engine.plain, more=engine.topics(told))
        this = Run(engine, told, input_, transport, clock)
        say("running the worker")
        async with started(engine.command(told), Path(told.folder), engine.first, clock) as worker:
            cost = await this.follow(worker)
        say("comparing the results")
        wrong = await this.wrong(bootstrap)
    finally:
        await transport.stop()
        await log.remove_topics(bootstrap, told.app_id)
    return _line(this, worker, cost, wrong)


def told_of(job: str, name: str, bootstrap: str, folder: Path) -> Told:
    """What a worker is told that runs ``job`` on the engine ``name``, with a folder of its own below ``folder``."""
    app_id = f"peer-{name}-{job}-{uuid4().hex[:8]}"
    (folder / app_id).mkdir()
    return Told(
        job=job, bootstrap=bootstrap, source=f"{app_id}-orders", output=f"{app_id}-output", app_id=app_id,
        folder=str(folder / app_id), partitions=PARTITIONS, schema_id=SCHEMA_ID, window_ms=oracle.WINDOW_MS,
        grace_ms=GRACE_MS, disorder_ms=WATERMARK_MS, remembered_ms=REMEMBERED_MS, commit_ms=COMMIT_MS,
    )  # fmt: skip


def _line(this: Run, worker: Process, cost: Cost, wrong: list[str]) -> dict[str, Any]:
    assert worker.first is not None
    warm = this.warm_records_per_cpu_s(worker, cost)
    return {
        "name": f"peers-{this.told.job}-{this.engine.name}",
        "transport": "kafka",
        "job": this.told.job,
        "engine": this.engine.name,
        "records": len(this.input),
        "wall_s": round(cost.wall_s, 3),
        "worker_cpu_s": round(cost.cpu_s, 3),
        "records_per_worker_cpu_s": round(len(this.input) / cost.cpu_s),
        "records_per_worker_cpu_s_warm": None if warm is None else round(warm),
        "rss_mb": round(worker.rss_mb),
        "commits": this.commits,
        "start_s": round(worker.first.at_s - worker.started_s, 1),
        "start_cpu_s": round(worker.first.cpu_s, 1),
        "correct": not wrong,
        **({"wrong": wrong} if wrong else {}),
        "versions": {this.engine.title: this.engine.version()},
        "differs": this.engine.differs,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
