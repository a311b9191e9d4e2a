"""One benchmark from its input to its line: log and sinks started, orders produced, worker measured, results compared."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from uuid import uuid4
from xml.etree import ElementTree

import msgspec
import numpy as np
import psutil  # type: ignore[import-untyped]

from benchmarks import distinct_job, oracle, pipeline_job, results
from benchmarks.marks import TOPIC, Settings
from benchmarks.orders import PARTITIONS, Orders, orders
from benchmarks.worker import Measured, measure
from streamproc.core import limits
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import UserError
from streamproc.core.types import TopicPartition
from streamproc.testing import kafka_server
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from streamproc.transport.contract import OutRecord, TopicSpec, Transport

__all__ = ["COMMITS_MIN", "NAMES", "TRANSPORTS", "TooFewCommits", "commit_interval_s", "require_commits", "run"]

NAMES: Final = ("pipeline", "distinct", "count", "forward", "agent")
WITH_SINKS: Final = ("pipeline", "distinct")
TRANSPORTS: Final = ("embedded", "kafka")
COMMITS_MIN: Final = 20
FULL_RECORDS: Final = 2_000_000
COMMIT_INTERVAL_S: Final = 0.25
"""Of a run of `FULL_RECORDS`; shorter ones commit more often, so that there is something to commit in time."""
COMMIT_INTERVAL_S_MIN: Final = 0.02
FORWARD_INTERVAL_S: Final = 0.08
"""The same for `forward`, whose worker needs a second or two for `FULL_RECORDS`; of longer runs it grows, up to `_MAX`."""
FORWARD_INTERVAL_S_MAX: Final = 1.0
FETCH_BYTES_MIN: Final = 128 * 1024
WARM_RECORDS: Final = 20_000
SEND_RECORDS: Final = 20_000
PACKAGES: Final = (
    "streamproc", "faust-streaming", "aiokafka", "polars", "numba", "numpy", "rocksdict", "fastavro", "asyncpg", "redis",
)  # fmt: skip
Say = Callable[[str], None]


class TooFewCommits(UserError):
    """What does not commit is not exactly-once: the figures of such a run say nothing."""


@dataclass(frozen=True)
class Log:
    """A log that the worker is given by its URL, and that is written and read here while no worker holds it."""

    broker: str
    version: dict[str, str]

    def open(self) -> Transport:
        scheme, _, rest = self.broker.partition("://")
        # Imported here, so that neither needs the other's libraries.
        if scheme == "embedded":
            from streamproc.transport.embedded import EmbeddedTransport

            return EmbeddedTransport(Path(rest), SystemClock())
        from streamproc.transport.kafka import KafkaTransport

        return KafkaTransport(rest, SystemClock(), client_id="benchmarks")


def run(
    name: str, records: int, transport: str, *, clock: Clock, interval_s: float | None = None, profile: str = "",
    say: Say = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """Run benchmark ``name`` and return its line. Blocks for minutes; ``say`` is told what goes on.

    Raises `TooFewCommits` when the worker committed fewer than `COMMITS_MIN` epochs of orders, `UserError` when it
    failed. Wrong results are no exception: the line says ``correct: false`` and what differs.
    """
    say(f"making {records:,} orders")
    input_ = orders(records)
    with ExitStack() as stack:
        folder = stack.enter_context(_folder())
        say(f"starting {transport}")
        log = stack.enter_context(_log(transport, folder))
        number = uuid4().hex[:8]  # a broker that outlives the run may hold topics of others
        told = Settings(
            broker=log.broker, folder=str(folder / "state"), app_id=f"benchmark-{name}-{number}",
            topic=f"{TOPIC}-{number}", records=records,
            commit_interval_s=commit_interval_s(records, name) if interval_s is None else interval_s, profile=profile,
            fetch_bytes_max=fetch_bytes_max(records),
        )  # fmt: skip
        _warm_up(name, told, log, folder, clock, say)
        if name in WITH_SINKS:
            told = stack.enter_context(_sinks(told, folder))
        say(f"producing {records:,} orders")
        asyncio.run(_produce(log, told.topic, input_))
        say("running the worker")
        measured = measure(f"{name}_job", told, clock)
        say("comparing the results")
        wrong = asyncio.run(_compare(name, told, log, input_))
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
    if commits < COMMITS_MIN:
        raise TooFewCommits(
            f"The worker of {name} committed {commits} times in {measured.wall_s:.2f} s, fewer than {COMMITS_MIN}: the "
            "run is refused.",
            remedy="Give it more records, or a shorter --commit-interval.",
        )
    return commits


def _warm_up(name: str, told: Settings, log: Log, folder: Path, clock: Clock, say: Say) -> None:
    """A short run of its own, so that compiled code is in its cache and files are in the machine's memory."""
    say("warming up")
    warm = msgspec.structs.replace(
        told, app_id=f"{told.app_id}-warm", topic=f"{told.topic}-warm", records=WARM_RECORDS, folder=str(folder / "warm"),
        profile="",
    )  # fmt: skip
    asyncio.run(_produce(log, warm.topic, orders(WARM_RECORDS)))
    measure(f"{name}_job", warm, clock)


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder; passable, since Postgres may run as another user below it."""
    folder = Path(tempfile.mkdtemp(prefix="streamproc-benchmark-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _log(kind: str, folder: Path) -> Iterator[Log]:
    """An empty log below ``folder``, or a Kafka that runs until the end of the block."""
    if kind == "embedded":
        (folder / "log").mkdir()
        yield Log(f"embedded://{folder / 'log'}", {"sqlite": sqlite3.sqlite_version})
        return
    with kafka_server.KafkaServer() as kafka:
        yield Log(f"kafka://{kafka.bootstrap}", {"kafka": _kafka_version()})


def _kafka_version() -> str:
    if os.environ.get("KAFKA_BOOTSTRAP"):
        return "KAFKA_BOOTSTRAP"
    pom = ElementTree.parse(Path(kafka_server.__file__).parent / "kafka" / "pom.xml")
    space = "{http://maven.apache.org/POM/4.0.0}"
    found = [dependency.findtext(f"{space}version") for dependency in pom.iter(f"{space}dependency")]
    return found[0] or "unknown"


@contextmanager
def _sinks(told: Settings, folder: Path) -> Iterator[Settings]:
    """An empty Redis and an empty Postgres of the run's own."""
    redis, postgres = EmbeddedRedis(folder / "redis"), EmbeddedPostgres(folder / "postgres")
    try:
        redis.start()
        postgres.start()
        yield msgspec.structs.replace(told, redis=redis.url, postgres=postgres.dsn)
    finally:
        redis.stop()
        postgres.stop()


async def _produce(log: Log, topic: str, input_: Orders, partitions: int = PARTITIONS) -> None:
    transport = log.open()
    await transport.start()
    try:
        # Old event times are no reason for a broker to drop anything.
        await transport.create_topics([TopicSpec(topic, partitions, {"retention.ms": "-1"})])
        for part in input_.slices(SEND_RECORDS):
            await transport.send(
                {
                    TopicPartition(topic, partition): [OutRecord(key, value) for key, value in records]
                    for partition, records in part.items()
                }
            )
    finally:
        await transport.stop()


async def _compare(name: str, told: Settings, log: Log, input_: Orders) -> list[str]:
    """Everything that the run left against the oracle."""
    transport = log.open()
    await transport.start()
    try:
        match name:
            case "agent":
                wanted = oracle.orders_per_user(input_.parquet)
                return oracle.differences("changelog", wanted, await results.agent_rows(told, transport))
            case "count":
                wanted = oracle.orders_per_user(input_.parquet)
                return oracle.differences("changelog", wanted, await results.count_rows(told, transport))
            case "forward":
                return await _compare_forwarded(told, transport, input_)
            case "distinct":
                wanted = oracle.buyers_by_country(input_.parquet)
                return await _compare_windows(distinct_job, {"orders": int, "buyers": int}, wanted, told, transport)
        wanted = oracle.revenue_by_country(input_.parquet)
        return await _compare_windows(pipeline_job, {"orders": int, "revenue": float}, wanted, told, transport)
    finally:
        await transport.stop()


async def _compare_windows(
    job: ModuleType, columns: Mapping[str, type], wanted: oracle.Rows, told: Settings, transport: Transport
) -> list[str]:
    """Every row of the table, as its changelog has it, and of both sinks."""
    return [
        *oracle.differences("changelog", wanted, await results.window_rows(job, columns, told, transport)),
        *oracle.differences("Redis", wanted, await results.redis_rows(told.redis, job.TABLE, columns)),
        *oracle.differences("Postgres", wanted, await results.postgres_rows(told.postgres, job.TABLE, columns)),
    ]


async def _compare_forwarded(told: Settings, transport: Transport, input_: Orders) -> list[str]:
    """Every record of the output topic, byte for byte and in its order."""
    places = np.array(oracle.completed(input_.parquet), np.int64)
    wrong = []
    for partition in range(told.partitions):
        mine = places[input_.partitions[places] == partition].tolist()
        wanted = [input_.record(place) for place in mine]
        got = await results.forwarded(told, transport, partition)
        wrong += oracle.differences_in_order(f"partition {partition}", wanted, got)
    return wrong


def _line(name: str, transport: str, told: Settings, measured: Measured, wrong: list[str], log: Log) -> dict[str, Any]:
    packages = {package: version(package) for package in PACKAGES}
    line = {
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
        "correct": not wrong,
        "versions": {"python": platform.python_version(), **packages, **log.version},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
    }
    if wrong:
        line["wrong"] = wrong
    if told.profile:
        line["profiled"] = True
    return line


def _machine() -> str:
    """What kind it is, never whose."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()} {platform.machine()}"
