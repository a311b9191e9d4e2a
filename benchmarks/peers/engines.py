"""The four peers, each with the settings that its documentation names for throughput."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.peers.engine import ROOT, Command, Engine, JvmEngine, PythonEngine
from benchmarks.peers.jobs.told import Told, schema
from streamproc.transport.contract import TopicSpec

__all__ = ["ENGINES", "JOBS", "Faust", "Flink", "KafkaStreams", "Quix"]

JOBS: Final = ("pipeline", "count", "forward")
_CLOCK: Final = (
    "Its clock is the greatest event time seen, in whatever partition, and a backlog is not read in step: it is given more "
    "grace than the data span, or it would drop orders."
)


class Faust(PythonEngine):
    name, title, package = "faust", "Faust", "faust-streaming"
    differs = (
        "Publishes every change of a window, since its windows close by the wall clock. Remembers order ids for ever "
        "(its tables have no time to live). Its exactly-once does not survive a kill. Commits every second. JSON by "
        "orjson, uvloop, log level info: its default, warn, makes a record of every debug line."
    )
    updates = True
    records: ClassVar[Mapping[str, int]] = dict.fromkeys(JOBS, 50_000)

    def command(self, told: Told) -> Command:
        return self._command(
            told, "-m", "faust", "-A", "benchmarks.peers.jobs.faust_job", "--workdir", str(ROOT), "--datadir",
            f"{told.folder}/data", "--loop", "uvloop", "worker", "-l", "info", "--without-web",
        )  # fmt: skip

    def topics(self, told: Told) -> list[TopicSpec]:
        """Faust makes its internal topics just before it joins its group, and assigns only what its view of the cluster
        shows by then ("Ignoring missing topic"). Without its topic an agent gets nothing until some later rebalance,
        and without its table's changelog it crashes at every record (`PartitionsMismatch`): half of the runs were
        wrong by that."""
        tables = {"pipeline": ("seen", "revenue"), "count": ("counts",), "forward": ()}[told.job]
        changelogs = [f"{told.app_id}-{table}-changelog" for table in tables]
        between = [TopicSpec(told.paid, told.partitions)] if told.job == "pipeline" else []
        return [*between, *(TopicSpec(name, told.partitions, {"cleanup.policy": "compact"}) for name in changelogs)]

    def count(self, key: bytes, value: bytes) -> tuple[int, int]:
        return int(json.loads(key)), int(json.loads(value))


class Quix(PythonEngine):
    name, title, package = "quix", "Quix Streams", "quixstreams"
    differs = f"Remembers order ids for an hour. {_CLOCK} Commits every second."
    records: ClassVar[Mapping[str, int]] = dict.fromkeys(JOBS, 500_000)

    def command(self, told: Told) -> Command:
        return self._command(told, "-m", "benchmarks.peers.jobs.quix_job")

    def counts_topic(self, told: Told) -> str:
        return f"changelog__{told.app_id}"

    def count(self, key: bytes, value: bytes) -> tuple[int, int]:
        return int(json.loads(key.split(b"|")[0])), int(json.loads(value))


class Flink(JvmEngine):
    name, title, artifact = "flink", "Flink SQL", "flink-clients"
    differs = (
        "Reads a copy of the orders without the five bytes of head, for which its format needs a schema registry. "
        "One JVM, parallelism 1. State has no changelog: RocksDB, incremental "
        "checkpoint to the local disk every second; `count` writes the new counts to an upsert topic. Mini-batches of a "
        "second. Remembers order ids for an hour. A watermark per partition, 10 s behind."
    )
    plain = offsets_lag = True
    first = "Adding split(s) to reader"

    def command(self, told: Told) -> Command:
        folder = Path(told.folder)
        (folder / "job.sql").write_text("".join(f"{statement};\n" for statement in _sql(told)))
        (folder / "settings").write_text("".join(f"{name}={value}\n" for name, value in _settings(told).items()))
        packages = ("lang", "util", "net", "io", "nio", "lang.reflect", "text", "time", "util.concurrent",
                    "util.concurrent.atomic", "util.concurrent.locks")  # fmt: skip
        opened = [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in packages]
        logs = [
            "-Dorg.slf4j.simpleLogger.log.org.apache.flink.connector.base.source.reader=info",
            "-Dorg.slf4j.simpleLogger.log.org.apache.flink.metrics=error",
        ]
        files = [str(folder / "job.sql"), str(folder / "settings")]
        return self._java(*opened, "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED", *logs, arguments=files), {}

    def counts_topic(self, told: Told) -> str:
        return told.output

    def count(self, key: bytes, value: bytes) -> tuple[int, int]:
        return int(json.loads(key)["user_id"]), int(json.loads(value)["n"])


def _settings(told: Told) -> dict[str, str]:
    return {
        "execution.checkpointing.interval": f"{told.commit_ms} ms",
        "execution.checkpointing.mode": "EXACTLY_ONCE",
        "execution.checkpointing.dir": f"file://{told.folder}/checkpoints",
        "execution.checkpointing.storage": "filesystem",
        "execution.checkpointing.incremental": "true",
        "state.backend.type": "rocksdb",
        "state.backend.rocksdb.localdir": f"{told.folder}/rocksdb",
        "taskmanager.memory.managed.size": "512m",
        "parallelism.default": "1",
        "pipeline.object-reuse": "true",
        "table.exec.state.ttl": f"{told.remembered_ms} ms",
        "table.exec.mini-batch.enabled": "true",
        "table.exec.mini-batch.allow-latency": "1 s",
        "table.exec.mini-batch.size": "5000",
        "table.local-time-zone": "UTC",
        "rest.bind-port": "20000-21000",
        "restart-strategy.type": "none",
    }


_COLUMNS: Final = """order_id STRING NOT NULL, user_id BIGINT NOT NULL, country STRING NOT NULL, status STRING NOT NULL,
  amount DOUBLE NOT NULL, event_time TIMESTAMP(3) NOT NULL, sku STRING NOT NULL, note STRING NOT NULL"""


def _sql(told: Told) -> list[str]:
    broker = f"'properties.bootstrap.servers'='{told.bootstrap}'"
    watermark = f""",
  WATERMARK FOR event_time AS event_time - INTERVAL '{told.disorder_ms // 1000}' SECOND, pt AS PROCTIME()"""
    source = f"""CREATE TABLE orders ({_COLUMNS}{watermark if told.job == "pipeline" else ""}) WITH (
  'connector'='kafka', 'topic'='{told.source}', {broker}, 'properties.group.id'='{told.app_id}', 'value.format'='avro',
  'scan.startup.mode'='earliest-offset', 'scan.topic-partition-discovery.interval'='0 s')"""
    sink = f"""'topic'='{told.output}', {broker}, 'sink.delivery-guarantee'='exactly-once',
  'sink.transactional-id-prefix'='{told.app_id}', 'properties.transaction.timeout.ms'='600000'"""
    return [source, *{"pipeline": _pipeline, "count": _count, "forward": _forward}[told.job](told, sink)]


def _pipeline(told: Told, sink: str) -> list[str]:
    return [
        f"""CREATE TABLE revenue (country STRING, window_start BIGINT, `count` BIGINT, `sum` DOUBLE) WITH (
  'connector'='kafka', 'value.format'='json', {sink})""",
        """CREATE TEMPORARY VIEW paid AS SELECT country, amount, event_time FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY order_id ORDER BY pt ASC) AS nth FROM orders)
  WHERE nth = 1 AND status = 'completed'""",
        f"""INSERT INTO revenue
  SELECT country, 1000 * UNIX_TIMESTAMP(CAST(window_start AS STRING)), COUNT(*), SUM(amount)
  FROM TABLE(TUMBLE(TABLE paid, DESCRIPTOR(event_time), INTERVAL '{told.window_ms // 60_000}' MINUTES))
  GROUP BY country, window_start, window_end""",
    ]


def _count(told: Told, sink: str) -> list[str]:
    return [
        f"""CREATE TABLE counts (user_id BIGINT, n BIGINT, PRIMARY KEY (user_id) NOT ENFORCED) WITH (
  'connector'='upsert-kafka', 'key.format'='json', 'value.format'='json', {sink})""",
        "INSERT INTO counts SELECT user_id, COUNT(*) FROM orders GROUP BY user_id",
    ]


def _forward(told: Told, sink: str) -> list[str]:
    return [
        f"CREATE TABLE paid ({_COLUMNS}) WITH ('connector'='kafka', 'value.format'='avro', {sink})",
        "INSERT INTO paid SELECT * FROM orders WHERE status = 'completed'",
    ]


class KafkaStreams(JvmEngine):
    name, title, artifact = "kstreams", "Kafka Streams", "kafka-streams"
    differs = (
        f"Dedupe is a processor of ours over its window store, for it has none. Remembers order ids for an hour. {_CLOCK} "
        "One thread. Commits every second (its default is 100 ms), cache of 64 MB instead of 10."
    )

    def command(self, told: Told) -> Command:
        folder = Path(told.folder)
        (folder / "schema.json").write_text(json.dumps(schema()))
        settings = {
            "application.id": told.app_id,
            "bootstrap.servers": told.bootstrap,
            "state.dir": f"{told.folder}/state",
            "processing.guarantee": "exactly_once_v2",
            "num.stream.threads": 1,
            "commit.interval.ms": told.commit_ms,
            "statestore.cache.max.bytes": 64 * 2**20,
            "auto.offset.reset": "earliest",
            "replication.factor": 1,
        }
        (folder / "settings").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        facts = {
            "job": told.job, "source": told.source, "output": told.output, "schema": folder / "schema.json",
            "schema.id": told.schema_id, "window.ms": told.window_ms, "grace.ms": told.grace_ms,
            "remembered.ms": told.remembered_ms,
        }  # fmt: skip
        return self._java(
            *(f"-D{name}={fact}" for name, fact in facts.items()), arguments=[str(folder / "settings")]
        ), {}

    def count(self, key: bytes, value: bytes) -> tuple[int, int]:
        return int(key), int(struct.unpack(">q", value[-8:])[0])


ENGINES: Final[tuple[Engine, ...]] = (Faust(), Quix(), Flink(), KafkaStreams())
