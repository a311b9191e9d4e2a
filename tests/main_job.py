"""The main job on real servers: its workers as processes of their own, its input, and how its results differ from the
oracle's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.compare import compare_dead, compare_late, compare_table, read_postgres, read_redis
from demo.data import Feed
from demo.feed import write_feed
from demo.oracle import Expected
from streamproc.core.clock import SystemClock
from streamproc.operators.tablerows import TableRows
from streamproc.runtime.topology import internal_topics
from streamproc.state import changelog
from streamproc.testing.kafka_server import KafkaServer
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from streamproc.transport.kafka import KafkaTransport
from tests.apps import read_all, read_batches

__all__ = ["Place", "differences", "feed_kafka", "place"]

ROOT = Path(__file__).parents[1]


class Place:
    """A Kafka, a Postgres and a Redis for one run, and its workers."""

    def __init__(self, folder: Path, bootstrap: str, dsn: str, url: str) -> None:
        self.folder, self.bootstrap, self.dsn, self.url = folder, bootstrap, dsn, url
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, kill_at: int = 0) -> None:
        environment = {
            **os.environ,
            "STREAMPROC_BROKER": f"kafka://{self.bootstrap}",
            "STREAMPROC_POSTGRES": self.dsn,
            "STREAMPROC_REDIS": self.url,
            "TEST_FOLDER": str(self.folder),
            "TEST_NAME": name,
            "TEST_KILL_AT": str(kill_at),
        }
        command = [sys.executable, "-m", "faust", "-A", "tests.flights_worker", "worker", "--without-web", "-l", "info"]
        with (self.folder / f"{name}.log").open("wb") as out:
            self.workers[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def status(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {"tasks": {}, "finished": False}

    def wait(self, what: str, condition: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join((self.folder / f"{name}.log").read_text()[-3000:] for name in self.workers)
                states = {name: self.status(name) for name in self.workers}
                raise AssertionError(f"waited {seconds} s for {what}: {states}\n{logs}")
            time.sleep(0.05)

    def done(self, tasks: int) -> bool:
        """Every task is held by a living worker, and all that is held is finished."""
        living = [self.status(name) for name, worker in self.workers.items() if worker.poll() is None]
        return all(s["finished"] for s in living) and sum(len(s["tasks"]) for s in living) == tasks

    def stop(self) -> None:
        for worker in self.workers.values():
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers.values():
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                worker.send_signal(signal.SIGUSR1)
                time.sleep(1)
                worker.kill()
                worker.wait()
                raise AssertionError("\n".join(p.read_text()[-6000:] for p in self.folder.glob("*.log"))) from None


@contextmanager
def place(folder: Path, kafka: KafkaServer, sinks: tuple[EmbeddedPostgres, EmbeddedRedis]) -> Iterator[Place]:
    """``sinks`` are empty: the job uses its own names."""
    postgres, redis = sinks
    found = Place(folder, kafka.bootstrap, postgres.dsn, redis.url)
    try:
        yield found
    finally:
        found.stop()


async def differences(place: Place, expected: Expected) -> list[str]:
    from agents.flights import app

    found: list[str] = []
    transport = KafkaTransport(place.bootstrap, SystemClock())
    await transport.start()
    try:
        app.build_groups({"flights": 4})
        for handle in app.declaration.tables:
            rows: dict[bytes, bytes | None] = {}
            for _, batch in [b async for b in read_batches(transport, f"flights-{handle.name}-changelog")]:
                rows.update({row.key: row.value for row in changelog.read(batch)})
            live = [(key, value) for key, value in rows.items() if value is not None]
            frame = TableRows(handle.plan).results(live).drop("__state", "__epoch", "__visible")
            want = expected.tables[handle.name]
            found += [f"changelog {text}" for text in compare_table(handle.name, want, frame.to_dicts())]
            got = await read_postgres(place.dsn, handle.name)
            found += [f"postgres {text}" for text in compare_table(handle.name, want, got)]
            got = await read_redis(place.url, handle.name)
            found += [f"redis {text}" for text in compare_table(handle.name, want, got)]
            late = await read_all(transport, f"flights-late-{handle.name}")
            sides = [(partition, headers, value or b"") for partition, _, value, headers in late]
            found += compare_late(handle.name, expected.late[handle.name], sides)
        dead = await read_all(transport, "flights-flights-dead-letters")
        found += compare_dead(expected.dead, [(p, headers, value or b"") for p, _, value, headers in dead])
    finally:
        await transport.stop()
    return found


async def feed_kafka(place: Place, feed: Feed) -> None:
    """Topics that an earlier run has left go first."""
    from agents.flights import app

    transport = KafkaTransport(place.bootstrap, SystemClock())
    await transport.start()
    try:
        ours = [spec.name for spec in internal_topics(app.build_groups({"flights": 4}))]
        left = [name for name in ("flights", *ours) if await transport.partitions(name) is not None]
        await transport.delete_topics(left)
        await write_feed(feed, transport, quiet=True)
    finally:
        await transport.stop()
