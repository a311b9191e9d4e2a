"""One run: load and faults for so many seconds, then peace, then everything against the oracle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from chaos.compare import Tally, compare
from chaos.faults import Faults
from chaos.feed import Feed
from chaos.load import ORDERS, PARTITIONS, PAYMENTS
from chaos.machine import Machine
from chaos.oracle import expect
from streamproc.core.clock import Clock
from streamproc.transport.contract import TopicSpec
from streamproc.transport.kafka import KafkaTransport

__all__ = ["Result", "Settings", "run"]

GROUPS: Final = ("read-orders", "table-minutes", "table-tens", "agents")
TASKS: Final = len(GROUPS) * PARTITIONS
READY_S: Final = 180.0
"""Until all tasks have run once; the first start may have to compile."""
DRAIN_S: Final = 60.0
FAILURES_MAX: Final = 5
"""Workers that end by themselves so often are not going to get better."""
LOOK_S: Final = 0.25
QUIET_LOOKS: Final = 4
"""How often in a row nothing may have moved before the end is believed."""
BROKER_FAULT_S: Final = 60.0
"""A worker that finds no broker at its start says so and ends: with a broker killed so shortly before, that is right."""


@dataclass(frozen=True)
class Settings:
    seconds: float
    seed: int
    rate: int
    """Records a second, of both topics."""
    folder: Path


@dataclass
class Result:
    """``failures``: what went wrong beside the results themselves."""

    records: int
    faults: Faults
    tally: Tally = field(default_factory=Tally)
    failures: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.tally.clean and not self.failures

    def last_line(self) -> str:
        faults, tally = self.faults, self.tally
        return (
            f"records={self.records} kills={faults.kills} pauses={faults.pauses} restarts={faults.restarts} "
            f"lost={tally.lost} duplicated={tally.duplicated} wrong={tally.wrong}"
        )


class Run:
    """``say`` tells a person what happens, ``show`` how things stand."""

    def __init__(
        self, settings: Settings, clock: Clock, say: Callable[[str], None], show: Callable[[str], None]
    ) -> None:
        self.settings, self.clock, self.say, self.show = settings, clock, say, show
        self.machine = Machine(settings.folder, clock)
        self.faults = Faults(self.machine, settings.seed, clock, say)
        self.failures: list[str] = []
        self._feed: Feed | None = None

    async def run(self) -> Result:
        try:
            await self.machine.start_servers()
            await self._make_topics()
            self.machine.start_workers()
            feed = self._feed = Feed(
                self.machine.servers().broker, self.settings.seed, self.settings.rate, self.clock, self.lag
            )
            await self._wait_until_ready()
            self.say("all tasks run; the load begins")
            await self._under_fire(feed)
            self.say(f"peace; {self.lag():,} of {feed.records:,} records are not committed")
            drained = await self._drain()
            await self._stop_workers()
            result = Result(feed.records, self.faults, failures=self.failures + self.faults.failures)
            self.say("comparing everything with the oracle")
            expected = await asyncio.to_thread(expect, self.settings.seed, feed.sent[ORDERS], feed.sent[PAYMENTS])
            result.tally = await compare(self.machine.servers(), expected)
            if not drained:
                result.failures.append("not everything had arrived in time: what is lost may only be late")
            return result
        finally:
            await self.machine.stop()

    async def _make_topics(self) -> None:
        transport = KafkaTransport(self.machine.servers().broker, self.clock)
        await transport.start()
        try:
            await transport.create_topics([TopicSpec(ORDERS, PARTITIONS), TopicSpec(PAYMENTS, PARTITIONS)])
        finally:
            await transport.stop()

    # ---- the three parts of a run

    async def _wait_until_ready(self) -> None:
        end = self.clock.monotonic_s() + READY_S
        while list(self.machine.tasks().values()).count("quiet") < TASKS:
            self._look_after_workers()
            self.show("starting three workers")
            if self.clock.monotonic_s() > end:
                words = "\n".join(worker.last_words() for worker in self.machine.workers)
                raise TimeoutError(f"after {READY_S:.0f} s only these tasks run: {self.machine.tasks()}\n{words}")
            await self.clock.sleep(LOOK_S)

    async def _under_fire(self, feed: Feed) -> None:
        """Faults stop first: what is sent until the last of them is over is load as well."""
        stop_faults, stop_load = asyncio.Event(), asyncio.Event()
        began, end = self.clock.monotonic_s(), self.clock.monotonic_s() + self.settings.seconds
        load = asyncio.create_task(feed.run(stop_load))
        faults = asyncio.create_task(self.faults.run(stop_faults))
        try:
            while not (load.done() or faults.done()):
                if self.clock.monotonic_s() >= end or len(self.failures) > FAILURES_MAX:
                    stop_faults.set()
                self._look_after_workers()
                self.show(
                    f"{self.clock.monotonic_s() - began:3.0f} s, {feed.records:,} records sent, "
                    f"{self.lag():,} not committed, {len(self.machine.working())} workers"
                )
                await self.clock.sleep(LOOK_S)
            stop_faults.set()
            stop_load.set()
            await asyncio.gather(load, faults)
        finally:
            for running in (load, faults):
                running.cancel()

    async def _drain(self) -> bool:
        """Until nothing moves any more and all of it is committed and in the sinks."""
        end, looks, before = self.clock.monotonic_s() + DRAIN_S, 0, -1
        while self.clock.monotonic_s() < end:
            self._look_after_workers()
            tasks, commits = self.machine.tasks(), sum(w.status()["commits"] for w in self.machine.workers)
            joined = all(worker.status()["tasks"] for worker in self.machine.workers)
            still = joined and len(tasks) == TASKS and set(tasks.values()) == {"quiet"} and not self.lag()
            looks = looks + 1 if still and commits == before else 0
            before = commits
            if looks >= QUIET_LOOKS:
                return True
            self.show(f"peace: {self.lag():,} records not committed, {list(tasks.values()).count('quiet')} tasks quiet")
            await self.clock.sleep(LOOK_S)
        loud = {task: at for task, at in self.machine.tasks().items() if at != "quiet"}
        self.say(
            f"after {DRAIN_S:.0f} s of peace not at rest: {len(tasks)} of {TASKS} tasks are held; not quiet: {loud}; "
            f"sent and committed: {self._behind()}"
        )
        return False

    async def _stop_workers(self) -> None:
        codes = await asyncio.gather(*(worker.stop() for worker in self.machine.workers))
        for worker, code in zip(self.machine.workers, codes, strict=True):
            if code != 0:
                self.failures.append(f"worker {worker.name} ended with {code} on SIGTERM:\n{worker.last_words()}")

    # ---- watching

    def _look_after_workers(self) -> None:
        """One that ended by itself is a failure, unless it found no broker at its start; it is started again."""
        for worker in self.machine.workers:
            if worker.runs or worker.meant_to_end:
                continue
            words, code = worker.last_words(), worker.exit_code
            known = "BrokerUnavailable" in words or "broker" in words.splitlines()[-1].lower()
            if known and self.clock.monotonic_s() - self.faults.broker_down_s < BROKER_FAULT_S:
                self.say(f"worker {worker.name} ended with {code}: it found no broker; started again")
            else:
                self.say(f"worker {worker.name} ended by itself with {code}; started again")
                self.failures.append(f"worker {worker.name} ended by itself with {code}:\n{words}")
            worker.start()

    def lag(self) -> int:
        """Records sent and not yet committed by a source's task or by the agents."""
        return sum(sent - at for sent, at in self._behind().values())

    def _behind(self) -> dict[str, tuple[int, int]]:
        """Source partition -> records sent and committed, where the two differ."""
        committed = self.machine.committed()
        return {tp: (sent, committed.get(tp, 0)) for tp, sent in self._sent().items() if sent > committed.get(tp, 0)}

    def _sent(self) -> dict[str, int]:
        assert self._feed is not None
        return {f"{topic}:{p}": count for topic, counts in self._feed.sent.items() for p, count in enumerate(counts)}


async def run(settings: Settings, clock: Clock, say: Callable[[str], None], show: Callable[[str], None]) -> Result:
    """Raises what kept the run from coming to a result."""
    return await Run(settings, clock, say, show).run()
