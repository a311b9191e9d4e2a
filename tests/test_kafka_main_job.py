"""The main job on a real Kafka, two workers, one killed with SIGKILL in the middle of an epoch: equal to the oracle."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from pathlib import Path

import pytest

from demo.data import Feed, make_feed
from demo.oracle import Expected, expect
from streamproc.testing.kafka_server import KafkaServer
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from tests.main_job import differences, feed_kafka, place

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

DAYS = 30
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def job() -> tuple[Feed, Expected]:
    feed = make_feed(DAYS)
    return feed, expect(feed.injections)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_workers_one_killed_in_the_middle_of_an_epoch(
    tmp_path: Path,
    kafka: KafkaServer,
    emptied: tuple[EmbeddedPostgres, EmbeddedRedis],
    job: tuple[Feed, Expected],
    seed: int,
) -> None:
    feed, expected = job
    with place(tmp_path, kafka, emptied) as here:
        asyncio.run(feed_kafka(here, feed))
        kill_at = random.Random(seed).randrange(len(feed.rows) // 50, len(feed.rows) // 3)
        here.start("a")
        here.start("b", kill_at)
        here.wait("both workers to be there", lambda: all((tmp_path / f"{n}.ready").exists() for n in "ab"), 60)
        (tmp_path / "go").touch()
        here.wait(f"worker b to kill itself at {kill_at}", lambda: here.workers["b"].poll() is not None, 90)
        assert here.workers["b"].returncode == -signal.SIGKILL
        lost = json.loads((tmp_path / "b.killed").read_text())
        assert any(read > committed for committed, read in lost.values()), lost
        here.wait("worker a to end the job alone", lambda: here.done(tasks=12), 120)
        assert asyncio.run(differences(here, expected)) == []
