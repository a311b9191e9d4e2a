"""Workers attacked on a real Kafka: blocked, killed, given an old store, beside other code. One that is stopped past its
session is in `test_fencing_kafka`.

Each test was a search for records lost, doubled or kept waiting; what stays here is the schedule, and that it is exact.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamproc.core.clock import SystemClock
from streamproc.core.partitioner import partition_of
from streamproc.core.types import TopicPartition
from streamproc.state import changelog
from streamproc.state.packing import unpack_key, unpack_value
from streamproc.testing.kafka_server import KafkaServer
from streamproc.transport.contract import OutRecord, TopicSpec
from streamproc.transport.kafka import KafkaTransport
from tests.apps import read_all, read_batches

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

PARTITIONS = 4
RECORDS: list[dict[str, Any]] = [
    {"id": i, "key": f"k{(i * i + 7 * i) % 97}", "amount": i % 13 - 3} for i in range(8_000)
]

WORKER = """
import json, os, time
from pathlib import Path

import streamproc as sp
from streamproc.core import limits

FOLDER, NAME = Path(os.environ["TEST_FOLDER"]), os.environ["TEST_NAME"]
limits.FETCH_PARTITION_BYTES_MAX = 4096
APP = os.environ["TEST_APP"]
app = sp.App(APP, broker=os.environ["TEST_BROKER"], commit_interval="200ms", topic_partitions=4)
app.conf.broker_session_timeout = 6.0
app.conf.broker_heartbeat_interval = 1.0
app.conf.datadir = FOLDER / f"state-{NAME}"
orders = app.topic(f"{APP}-orders", partitions=4, value_serializer="json", key_type=bytes)
results = app.topic(f"{APP}-results", partitions=4, value_serializer="json", key_type=bytes)
totals = app.Table(os.environ.get("TEST_TABLE", "sums"), default=int, partitions=4)
BLOCK = FOLDER / f"block-{NAME}"


@app.agent(orders)
async def add(stream):
    async for order in stream:
        key = order["key"]
        totals[key] += order["amount"]
        await results.send(key=key.encode(), value={"id": order["id"], "total": totals[key]})
        if order["id"] % 40 == 0:
            await app.sleep(0.03)
        if BLOCK.exists():
            seconds = float(BLOCK.read_text())
            BLOCK.unlink()
            time.sleep(seconds)


@app.task
async def tell():
    while not app.should_stop:
        held = [task for task in app.runtime.tasks.values() if task.record is not None]
        done = sum(at for task in held for of in task.record.positions.values() for at in of.values())
        new = FOLDER / f"{NAME}.new"
        new.write_text(json.dumps({"tasks": len(app.runtime.tasks), "done": done}))
        new.rename(FOLDER / f"{NAME}.json")
        await app.sleep(0.05)
"""


class Crew:
    """Workers of `WORKER` on one broker."""

    def __init__(self, folder: Path, kafka: KafkaServer) -> None:
        self.folder, self.kafka = folder, kafka
        self.app = f"totals-{uuid.uuid4().hex[:8]}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "totals_worker.py").write_text(WORKER)

    def start(self, name: str, **environment: str) -> subprocess.Popen[bytes]:
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        settings = {
            "TEST_FOLDER": str(self.folder),
            "TEST_NAME": name,
            "TEST_APP": self.app,
            "TEST_BROKER": f"kafka://{self.kafka.bootstrap}",
        }
        command = [sys.executable, "-m", "faust", "-A", "totals_worker", "worker", "--without-web", "-l", "info"]
        with (self.folder / f"{name}.log").open("ab") as out:
            worker = subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **settings, **environment}, stdout=out, stderr=out
            )
        self.running[name] = worker
        return worker

    def kill(self, name: str) -> None:
        worker = self.running.pop(name)
        worker.kill()
        worker.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def status(self, name: str) -> dict[str, int]:
        path = self.folder / f"{name}.json"
        return dict(json.loads(path.read_text())) if path.exists() else {"tasks": 0, "done": 0}

    def done(self) -> int:
        """Records committed, told by those who hold them now."""
        return sum(self.status(name)["done"] for name in self.running)

    def finished(self) -> bool:
        return self.done() == len(RECORDS) and sum(self.status(name)["tasks"] for name in self.running) == PARTITIONS

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            told = {name: (worker.poll(), self.status(name)) for name, worker in self.running.items()}
            assert time.monotonic() < end, f"waited for {what}: {told}\n" + "\n".join(
                self.log(name)[-3000:] for name in self.running
            )
            time.sleep(0.05)


@contextmanager
def crew(folder: Path, kafka: KafkaServer) -> Iterator[Crew]:
    """With all records in the topic of its application, which has a name of its own."""
    found = Crew(folder, kafka)
    asyncio.run(_fill(kafka.bootstrap, found.app))
    try:
        yield found
    finally:
        for name in list(found.running):
            found.kill(name)


async def _fill(bootstrap: str, app: str) -> None:
    transport = KafkaTransport(bootstrap, SystemClock())
    await transport.start()
    try:
        await transport.create_topics([TopicSpec(f"{app}-{side}", PARTITIONS) for side in ("orders", "results")])
        records: dict[TopicPartition, list[OutRecord]] = {}
        for order in RECORDS:
            key = order["key"].encode()
            tp = TopicPartition(f"{app}-orders", partition_of(key, PARTITIONS))
            records.setdefault(tp, []).append(OutRecord(key, json.dumps(order).encode()))
        await transport.send(records)
    finally:
        await transport.stop()


async def outcome(here: Crew) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """What a `read_committed` reader sees: (id, total) of every result, and the table."""
    transport = KafkaTransport(here.kafka.bootstrap, SystemClock())
    await transport.start()
    try:
        results = [json.loads(value or b"") for _, _, value, _ in await read_all(transport, f"{here.app}-results")]
        table: dict[str, int] = {}
        async for _, batch in read_batches(transport, f"{here.app}-sums-changelog"):
            table.update({unpack_key(row.key): unpack_value(row.value) for row in changelog.read(batch) if row.value})
        return sorted((result["id"], result["total"]) for result in results), table
    finally:
        await transport.stop()


def wanted() -> tuple[list[tuple[int, int]], dict[str, int]]:
    table: dict[str, int] = {}
    results = []
    for order in RECORDS:
        table[order["key"]] = table.get(order["key"], 0) + order["amount"]
        results.append((order["id"], table[order["key"]]))
    return results, table


def test_totals_are_exact_through_kills_a_blocked_loop_and_a_broker_that_dies(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    with crew(tmp_path, kafka) as here:
        here.start("a")
        here.start("b")
        here.wait("both to have committed", lambda: all(here.status(name)["done"] for name in "ab"))
        (tmp_path / "block-b").write_text("8")
        here.wait("a to take over from b, which is blocked", lambda: here.status("a")["tasks"] == PARTITIONS)
        if not os.environ.get("KAFKA_BOOTSTRAP"):
            here.kafka.kill()
            here.kafka.start()
        here.wait("b to be back", lambda: 0 < here.status("b")["tasks"] < PARTITIONS)
        here.kill("a")
        here.start("a")
        here.wait("the end", here.finished)
        assert "nothing ran in this worker for" in here.log("b")
        assert "its session time-out is 6 s" in here.log("b")
        # aiokafka tries ten times a second, for each of its clients, and would say so each time.
        assert here.log("b").count("Unable connect to node") + here.log("a").count("Unable connect to node") <= 20
        assert asyncio.run(outcome(here)) == wanted()


def test_a_store_that_is_replaced_by_an_old_copy_of_itself_is_rolled_forward(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    with crew(tmp_path, kafka) as here:
        worker = here.start("a")
        here.wait("some commits", lambda: here.done() > 1_000)
        worker.terminate()
        assert worker.wait(20) == 0
        shutil.copytree(tmp_path / "state-a", tmp_path / "old")
        here.start("a")
        here.wait("more commits", lambda: here.done() > 4_000)
        here.kill("a")
        shutil.rmtree(tmp_path / "state-a")
        (tmp_path / "old").rename(tmp_path / "state-a")
        here.start("a")
        here.wait("the end", here.finished)
        assert asyncio.run(outcome(here)) == wanted()


def test_other_code_is_refused_before_it_takes_a_partition_from_the_workers_that_run(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    """It used to join first: a wrong deployment, started over and over, rebalanced the right one each time."""
    with crew(tmp_path, kafka) as here:
        here.start("a")
        here.wait("some commits", lambda: here.done() > 500)
        wrong = here.start("wrong", TEST_TABLE="renamed")
        assert wrong.wait(60) == 1
        del here.running["wrong"]
        assert "was committed by another topology" in here.log("wrong")
        assert "Joined group" not in here.log("wrong")
        here.wait("the end", here.finished)
        assert here.log("a").count("Joined group") == 1
        assert asyncio.run(outcome(here)) == wanted()
