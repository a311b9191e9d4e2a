"""`simulate`: a user's own application under crashes, rebalances, lost answers and failing sinks, for a user's own tests."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamproc.app import App
from streamproc.core.errors import StreamprocError, UserError
from streamproc.core.limits import SESSION_TIMEOUT_S
from streamproc.core.types import TopicPartition
from streamproc.testing.simulation import steps
from streamproc.testing.simulation.application import (
    Build,
    Record,
    Writer,
    apart,
    declared_topics,
    makers_of,
    read_bounded,
)
from streamproc.testing.simulation.cluster import Cluster, Worker, scratch
from streamproc.testing.simulation.loop import bury, virtual_loop
from streamproc.testing.simulation.nemesis import Nemesis
from streamproc.testing.simulation.outcome import Outcome, differences, read_outcome
from streamproc.transport.contract import OutRecord

__all__ = ["Report", "simulate"]

Oracle = Callable[[Outcome], object]
TARGETS = 6
"""Steps that a seed's workers are to die at, beside what its dice draw."""
WORKERS = 2
ROUNDS = 2
"""Times that faults strike, with a while between for the application to get over them and go on."""
INPUT_S = 20.0
"""How long the input of a run under faults takes to arrive, so that faults strike in the middle of it."""
PORTION_MAX = 50
"""Records written at a time."""
COMMIT_S_MAX = 0.2
"""Commit interval of a run under faults, where the app's own is longer: a short input is to have many epochs."""
ROCKSDB_EVERY = 8
"""Every so many seeds have their state in RocksDB; stores in memory pass the same suite and are faster."""
TOLD = 40
"""Last lines of what happened, in a failure."""


@dataclass
class Report:
    """What `simulate` went through, for the curious."""

    seeds: list[int] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    """Those that struck, by kind; deaths are not among them."""
    died_at: set[str] = field(default_factory=set)
    """Steps of streamproc's code (an `await` and its place) that a worker died at."""
    steps: int = 0
    """Such places there are."""
    epochs: int = 0
    """Commits."""

    def add(self, seed: int, run: _Run) -> None:
        self.seeds.append(seed)
        self.faults.update(run.faults)
        self.died_at |= run.died
        self.epochs += run.epochs

    def __str__(self) -> str:
        return (
            f"{len(self.seeds)} seeds: {self.epochs} commits, {sum(self.faults.values())} faults, "
            f"workers died at {len(self.died_at)} of {self.steps} places"
        )


def simulate(
    app: str | Build,
    inputs: Mapping[str, Iterable[Any]],
    seeds: Iterable[int] = range(100),
    oracle: Oracle | None = None,
) -> Report:
    """Run ``app`` over ``inputs`` once without faults and once for each seed with those that the seed draws, and compare
    what is left: with the run without faults, or by ``oracle``, which is given an `Outcome` and raises `AssertionError`.

    ``app``: ``"module:attribute"``, or a function that makes the app; called for every start of a worker. ``inputs``: topic
    -> values or `Record`s. Topics that pipelines read are read as bounded: they end with the input, and every window closes.

    Raises one `AssertionError` with the seed, what differs, what happened and how to replay it; what ends a worker without
    any fault (`UserError`) as it is. Called from synchronous code. Nothing outside is touched: the log, sinks, disks and
    time are simulated, so sinks' servers are not needed, and an agent must not open connections or read the wall clock.
    """
    name = repr(app) if isinstance(app, str) else getattr(app, "__name__", "app")
    chosen = list(seeds)
    with apart("simulate()"), makers_of(app) as make:
        trial = _Trial(make, inputs)
        calm = trial.run(None)
        if calm.failure is not None:
            raise calm.failure
        if oracle is not None:
            oracle(calm.outcome)  # what fails without any fault is a matter between app and oracle
        with _instrumented() as places:
            report = Report(steps=len(places))
            for seed in chosen:
                run = trial.run(seed, places)
                wrong = run.failure or _judged(run.outcome, calm.outcome, oracle)
                if wrong is not None:
                    raise AssertionError(_told(name, seed, wrong, run.told)) from wrong
                report.add(seed, run)
    return report


def _judged(found: Outcome, expected: Outcome, oracle: Oracle | None) -> AssertionError | None:
    if oracle is None:
        differ = differences(found, expected)
        return AssertionError("\n  ".join(["not what a run without faults leaves:", *differ[:12]])) if differ else None
    try:
        oracle(found)
    except AssertionError as failure:
        return failure
    return None


def _told(name: str, seed: int, wrong: BaseException, told: Sequence[str]) -> str:
    text = str(wrong) or type(wrong).__name__
    lines = [f"simulate({name}): seed {seed} failed: {text}", f"What happened, the last of {len(told)} lines:"]
    lines += [f"  {line}" for line in told[-TOLD:]]
    lines.append(f"To replay: simulate({name}, …, seeds=[{seed}])")
    if os.environ.get("PYTHONHASHSEED", "random") == "random":
        lines.append(
            "The course of a seed may depend on Python's hashes: run under PYTHONHASHSEED=0 to have the same one."
        )
    return "\n".join(lines)


@contextmanager
def _instrumented() -> Iterator[list[str]]:
    """Places to die at, before and after each await, while this is open."""
    installed = steps.install()
    try:
        yield [point for step in installed.steps for point in (step, f"{step}, after")]
    finally:
        installed.uninstall()


# ---- one run


@dataclass
class _Run:
    outcome: Outcome = field(default_factory=Outcome)
    failure: BaseException | None = None
    """The app or streamproc broke a promise, or cannot run at all."""
    told: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    died: set[str] = field(default_factory=set)
    epochs: int = 0


class _Trial:
    """One app and its input, run again and again."""

    def __init__(self, make: Build, inputs: Mapping[str, Iterable[Any]]) -> None:
        self._make = make
        app = make()
        writer = Writer(app)
        self._topics = declared_topics(app)
        self._queues: dict[TopicPartition, list[OutRecord]] = {}
        for topic, values in inputs.items():
            for value in values:
                record = value if isinstance(value, Record) else Record(value)
                partition, out = writer.encode(topic, record)
                self._queues.setdefault(TopicPartition(topic, partition), []).append(out)
        self._inputs = frozenset(inputs)
        self._latest_ms = writer.latest_ms
        self._bounded = self._inputs & {source.topic for source in app.declaration.sources}

    def run(self, seed: int | None, places: Sequence[str] = ()) -> _Run:
        """Under the faults that ``seed`` draws; None: without any. ``places``: where workers can die."""
        try:
            with scratch() as folder:
                return self._run(seed, places, Path(folder))
        except BaseException as failure:
            failure.add_note(f"While simulating {'no faults' if seed is None else f'seed {seed}'}.")
            raise
        finally:
            bury()

    def _run(self, seed: int | None, places: Sequence[str], folder: Path) -> _Run:
        run = _Run()
        loop = virtual_loop(seed)
        rocksdb = seed is not None and seed % ROCKSDB_EVERY == 0
        cluster = Cluster(self._build, loop, random.Random(f"dice {seed}"), folder, rocksdb=rocksdb)
        nemesis = None if seed is None else Nemesis(cluster, _targets(seed, places))
        try:
            with steps.listening(cluster.at_step):
                run.outcome = loop.run(self._scenario(cluster, nemesis))
        except (AssertionError, UserError) as failure:
            run.failure = _without_frames(failure)
        if (broken := cluster.watch.broken) and not isinstance(run.failure, UserError):
            run.failure = AssertionError("; ".join([*broken[:3], *([str(run.failure)] if run.failure else [])]))
        run.told, run.faults, run.died = cluster.told, cluster.weather.counts, cluster.died
        run.epochs = cluster.watch.epochs
        return run

    def _build(self) -> App:
        app = self._make()
        read_bounded(app, self._bounded)
        app.commit_interval_s = min(app.commit_interval_s, COMMIT_S_MAX)
        return app

    async def _scenario(self, cluster: Cluster, nemesis: Nemesis | None) -> Outcome:
        await cluster.open()
        try:
            await cluster.broker.create_topics(self._topics)
            await self._write_bounded(cluster)
            mean_s = self._pause_s() if nemesis is not None else 0.0
            cluster.pause_s = lambda topics: (
                cluster.dice.uniform(0.0, 2.0 * mean_s) if mean_s and self._bounded.intersection(topics) else 0.0
            )
            for _ in range(WORKERS):
                cluster.start()
            feeding = asyncio.create_task(self._feed(cluster, nemesis), name="feeding")
            for _ in range(ROUNDS if nemesis is not None else 0):
                assert nemesis is not None
                await _torment(cluster, nemesis)
            await feeding
            mean_s = 0.0
            if nemesis is not None:
                await nemesis.make_peace()
                await cluster.settle()
            else:
                await settle(cluster)
            await cluster.check_changelogs()
            return await read_outcome(cluster, self._inputs, self._latest_ms)
        finally:
            await cluster.close()

    async def _write_bounded(self, cluster: Cluster) -> None:
        """Before the first start: what is bounded ends where it ends then."""
        for tp, records in self._queues.items():
            if tp.topic in self._bounded:
                for lo in range(0, len(records), PORTION_MAX):
                    await cluster.send(*tp, *records[lo : lo + PORTION_MAX])

    def _pause_s(self) -> float:
        """Between two batches of a bounded input, so that it takes about `INPUT_S` as a whole."""
        counts = [len(records) for tp, records in self._queues.items() if tp.topic in self._bounded]
        return INPUT_S / max(sum(counts) / 10, 4.0)

    async def _feed(self, cluster: Cluster, nemesis: Nemesis | None) -> None:
        """What agents read and no pipeline, while they run; the order between partitions is drawn."""
        dice = random.Random(cluster.dice.random())
        queues = [(tp, list(records)) for tp, records in self._queues.items() if tp.topic not in self._bounded]
        total = sum(len(records) for _, records in queues)
        largest = max(2, min(total // 20, PORTION_MAX))
        while queues:
            tp, records = queue = dice.choice(queues)
            count = dice.randrange(1, largest + 1)
            if nemesis is not None:
                await nemesis.feeding.wait()
            await cluster.send(*tp, *records[:count])
            del records[:count]
            if not records:
                queues.remove(queue)
            if nemesis is not None:
                await asyncio.sleep(dice.uniform(0.0, 2.0) * INPUT_S * count / total)


def _targets(seed: int, places: Sequence[str]) -> tuple[str, ...]:
    return tuple(places[(seed * TARGETS + at) % len(places)] for at in range(TARGETS))


async def _torment(cluster: Cluster, nemesis: Nemesis) -> None:
    """Faults, and longer than the session of a dead worker lasts. Workers go on dying at the seed's steps meanwhile."""
    await nemesis.torment()
    await asyncio.sleep(cluster.dice.uniform(SESSION_TIMEOUT_S, 2 * SESSION_TIMEOUT_S))


async def settle(cluster: Cluster) -> None:
    """`Cluster.settle`, where no worker may end: raises what ended it."""
    settling = asyncio.create_task(cluster.settle(), name="settling")
    while not settling.done():
        raise_what_ended(cluster.workers)
        await asyncio.sleep(0.1)
    settling.result()


def raise_what_ended(workers: Iterable[Worker]) -> None:
    """Raise the reason of a worker that ended by itself."""
    failure = next(filter(None, map(_what_ended, workers)), None)
    if isinstance(failure, StreamprocError):
        raise _without_frames(failure)  # it says what it has to say
    if failure is not None:
        raise failure


def _what_ended(worker: Worker) -> BaseException | None:
    ended = worker.life is not None and worker.life.done() and not worker.process.dead
    return worker.reason or (worker.life.exception() if ended and worker.life is not None else None)


def _without_frames(failure: BaseException) -> BaseException:
    """They, and those of what it came from, would keep what a dead worker abandoned."""
    link: BaseException | None = failure
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return failure
