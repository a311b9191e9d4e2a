"""The `streamproc` command: topics made, lag told, state given up; a user's mistake is one message and exit code 1."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from demo.feed import open_transport
from streamproc.cli import main
from streamproc.core.types import TopicPartition
from streamproc.testing.kafka_server import KafkaServer
from streamproc.transport.contract import OutRecord, TopicSpec
from tests.apps import events_avsc, log, rows_of, running, until, write

_numbers = itertools.count()
HOUR_MS = 3_600_000
APP = """
import streamproc as sp
from {sinks} import sink

app = sp.App("orders", broker="{broker}", schemas="{folder}/schemas", commit_interval="50ms",
             web_enabled=False, datadir="{folder}/state", topic_disable_leader=True)
events = app.topic("events", value_schema="event.avsc", {options}
                   event_time=sp.event_time("at", out_of_orderness="1h", idle_after="100ms"))
table = (app.pipeline(events).dedupe("id", within="8h").group_by("country").window(sp.tumbling("1h"))
         .agg({aggregates}).table("totals"))
table.sink(sink, emit="on_update")
"""


class Shop:
    """An app over and over again: each `code` is a new version of its module, on the same log, state and sink."""

    def __init__(self, folder: Path, broker: str | None = None) -> None:
        self.folder, self._sent = folder, 0
        self.broker = broker or f"embedded://{folder}/log"
        events_avsc(folder)
        self._sinks = f"shop_sinks_{next(_numbers)}"
        (folder / f"{self._sinks}.py").write_text(
            "from streamproc.testing.fake_sink import FakeSink\nsink = FakeSink()\n"
        )

    @property
    def sink(self) -> Any:
        return importlib.import_module(self._sinks).sink

    def code(self, aggregates: str = "orders=sp.count()", options: str = "partitions=2,") -> str:
        name = f"shop_{next(_numbers)}"
        text = APP.format(
            sinks=self._sinks, folder=self.folder, broker=self.broker, aggregates=aggregates, options=options
        )
        (self.folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    def sell(self, *countries: str) -> None:
        app = importlib.import_module(self.code()).app
        records = []
        for country in countries:
            self._sent += 1
            event = {"id": str(self._sent), "country": country, "amount": 1.0, "at": HOUR_MS + self._sent}
            records.append((self._sent % 2, OutRecord(None, app._declared["events"].encoder.encode(event))))

        async def send() -> None:
            transport = open_transport(self.broker)
            await transport.start()
            await transport.create_topics([TopicSpec("events", 2)])
            for partition, record in records:
                await transport.send({TopicPartition("events", partition): [record]})
            await transport.stop()

        asyncio.run(send())

    def run(self, module: str, orders: int) -> list[tuple[str, int]]:
        """Run until so many orders are counted and sunk; the table's rows."""
        app = importlib.import_module(module).app

        async def scenario() -> list[tuple[str, int]]:
            async with running(app):
                await until(lambda: sum(row["orders"] for row in rows_of(app, "totals")) >= orders, "the orders")
                await until(lambda: self.sunk() == rows(), "the sink")
                return rows()

        def rows() -> list[tuple[str, int]]:
            return sorted((row["country"], row["orders"]) for row in rows_of(app, "totals"))

        return asyncio.run(scenario())

    def sunk(self) -> list[tuple[str, int]]:
        return sorted((key[0], row["orders"]) for key, row in self.sink.rows["totals"].items())

    def topics(self) -> list[str]:
        async def read() -> list[str]:
            async with log(self.folder) as transport:
                return sorted(transport._log.topics)  # type: ignore[attr-defined]

        return asyncio.run(read())


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Shop(tmp_path)


def streamproc(*arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=answer, catch_exceptions=False)


def source_lag(output: str) -> int:
    """What the pipelines have not read. A table may be behind after a clean stop: its upstream tasks' last commit ships
    their watermarks when it may have closed already."""
    rows = [line.split() for line in output.splitlines() if line.startswith("read-")]
    assert rows, output
    return sum(int(row[-2].replace(",", "")) for row in rows)


def test_topics_are_listed_and_missing_ones_made(shop: Shop) -> None:
    module = shop.code()
    before = streamproc("topics", module)
    assert before.exit_code == 0
    lines = {line.split()[0]: line.split() for line in before.output.splitlines()[1:]}
    assert lines["events"][1:4] == ["declared", "2", "missing"]
    assert lines["orders-totals-changelog"][1:4] == ["changelog", "2", "missing"]
    assert shop.topics() == []
    assert "created" in streamproc("topics", module, "--create").output
    assert set(shop.topics()) == set(lines)
    again = streamproc("topics", f"{module}:app", "--create").output
    assert "missing" not in again
    assert "created" not in again


def test_a_topic_of_another_size_is_told(shop: Shop) -> None:
    asyncio.run(write(shop.folder, "events", 3, []))
    told = streamproc("topics", shop.code())
    assert "has 3 partitions, the app wants 2" in told.output


def test_a_number_of_partitions_that_the_code_leaves_open_is_asked_for(shop: Shop) -> None:
    module = shop.code(options="")
    refused = streamproc("topics", module, "--create")
    assert refused.exit_code == 1
    assert "--partitions N" in refused.output
    assert streamproc("topics", module, "--create", "--partitions", "3").exit_code == 0
    assert "orders-totals-commits" not in shop.topics()
    assert {"events", "orders-table-totals-commits", "orders-totals-changelog"} <= set(shop.topics())


def test_lag_is_the_backlog_before_a_run_and_nothing_after_it(shop: Shop) -> None:
    shop.sell("DE", "DE", "FR")
    module = shop.code()
    before = streamproc("lag", module)
    assert "none" in before.output
    assert before.output.splitlines()[-1] == "lag in all: 3"
    shop.run(shop.code(), 3)
    after = streamproc("lag", module)
    assert source_lag(after.output) == 0
    assert "none" not in after.output
    shop.sell("DE")
    assert source_lag(streamproc("lag", module).output) == 1


def test_a_reset_app_counts_everything_again_and_once(shop: Shop) -> None:
    shop.sell("DE", "DE", "FR")
    assert shop.run(shop.code(), 3) == [("DE", 2), ("FR", 1)]
    done = streamproc("reset", shop.code(), "--yes")
    assert done.exit_code == 0, done.output
    assert shop.topics() == ["events"]
    assert not (shop.folder / "state" / "v1" / "tables" / "tasks").exists()
    assert shop.sink.ledgers == {}
    assert shop.sunk() == [("DE", 2), ("FR", 1)]  # they stay until they are written again
    shop.sell("FR")
    assert shop.run(shop.code(), 4) == [("DE", 2), ("FR", 2)]
    assert shop.sunk() == [("DE", 2), ("FR", 2)]


def test_reset_asks_and_a_no_changes_nothing(shop: Shop) -> None:
    shop.sell("DE")
    shop.run(shop.code(), 1)
    topics, ledgers = shop.topics(), dict(shop.sink.ledgers)
    refused = streamproc("reset", shop.code(), answer="n\n")
    assert refused.exit_code == 1
    assert "orders-totals-changelog" in refused.output
    assert "ledger deleted: table totals in fake" in refused.output
    assert shop.topics() == topics
    assert shop.sink.ledgers == ledgers
    assert shop.run(shop.code(), 1) == [("DE", 1)]


def test_a_reset_table_takes_its_new_plan_and_what_comes_from_now_on(shop: Shop) -> None:
    shop.sell("DE", "FR", "FR")
    shop.run(shop.code(), 3)
    changed = "orders=sp.count(), revenue=sp.sum('amount')"
    assert streamproc("reset", shop.code(changed), "--table", "totals", "--sink-rows", "--yes").exit_code == 0
    assert shop.sunk() == []
    shop.sell("DE", "DE")
    assert shop.run(shop.code(changed), 2) == [("DE", 2)]
    assert shop.sunk() == [("DE", 2)]


def test_a_reset_dedupe_step_forgets_what_it_saw_and_no_position_moves(shop: Shop) -> None:
    shop.sell("DE", "FR")
    shop.run(shop.code(), 2)
    shop._sent = 0
    assert streamproc("reset", shop.code(), "--table", "events-dedupe-id", "--yes").exit_code == 0
    shop.sell("DE", "FR")  # the same ids again, which it no longer knows
    assert shop.run(shop.code(), 4) == [("DE", 2), ("FR", 2)]


def test_a_table_that_is_none_is_named_beside_those_that_are(shop: Shop) -> None:
    shop.sell()
    refused = streamproc("reset", shop.code(), "--table", "total", "--yes")
    assert refused.exit_code == 1
    assert "has no table 'total'" in refused.output
    assert "totals" in refused.output


def test_a_reset_broken_off_is_refused_by_the_app_and_ended_by_another(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamproc.transport.embedded import EmbeddedTransport

    shop.sell("DE", "FR")
    shop.run(shop.code(), 2)
    deleted: list[str] = []
    delete = EmbeddedTransport.delete_topics

    async def break_off(self: EmbeddedTransport, topics: list[str]) -> None:
        if len(deleted) == 1:
            raise KeyboardInterrupt
        deleted.extend(topics)
        await delete(self, topics)

    with monkeypatch.context() as patched:
        patched.setattr(EmbeddedTransport, "delete_topics", break_off)
        assert CliRunner().invoke(main, ["reset", shop.code(), "--yes"]).exit_code == 1
    assert deleted == ["orders-table-totals-commits"]  # first what makes the app refuse to start
    assert "no commit record" in _refusal(shop)
    assert streamproc("reset", shop.code(), "--yes").exit_code == 0
    assert shop.run(shop.code(), 2) == [("DE", 1), ("FR", 1)]


def test_a_worker_runs_until_it_is_told_to_stop(shop: Shop) -> None:
    shop.sell("DE", "FR")
    module = shop.code()
    command = [sys.executable, "-c", "from streamproc.cli import main; main()", "worker", module]
    command += ["--datadir", str(shop.folder / "elsewhere"), "--", "--without-web"]
    worker = subprocess.Popen(command, cwd=shop.folder, env=_environment(shop.folder), stderr=subprocess.DEVNULL)
    tasks = shop.folder / "elsewhere" / "v1" / "tables" / "tasks"

    async def stores() -> None:
        await until(lambda: tasks.exists() and len(list(tasks.iterdir())) == 4, "the stores of its tasks")

    asyncio.run(stores())
    worker.terminate()
    assert worker.wait(30) == 0
    assert shop.run(shop.code(), 2) == [("DE", 1), ("FR", 1)]  # and what it had not done is done by the next one


def _refusal(shop: Shop) -> str:
    done = _worker(shop.folder, shop.code())
    assert done.returncode == 1
    return done.stderr


def _worker(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from streamproc.cli import main; main()", "worker", *arguments]
    return subprocess.run(
        command, cwd=folder, env=_environment(folder), capture_output=True, text=True, timeout=60, check=False
    )


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parent.parent}"}


def test_what_is_wrong_at_start_is_one_message(shop: Shop) -> None:
    done = _worker(shop.folder, shop.code(options=""))
    assert done.returncode == 1
    assert "Topic events does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_in_the_code_is_one_message_that_names_the_line(shop: Shop) -> None:
    module = shop.code(aggregates="orders=sp.sum('amuont')")
    done = _worker(shop.folder, module)
    assert done.returncode == 1
    assert "amuont" in done.stderr
    assert f"{module}.py:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["worker", "topics", "lag", "reset"])
def test_a_module_that_is_none_is_one_message(shop: Shop, command: str) -> None:
    refused = streamproc(command, "no_such_shop")
    assert refused.exit_code == 1
    assert "There is no module no_such_shop" in refused.output


def test_a_module_without_an_app_is_one_message(shop: Shop) -> None:
    (shop.folder / "empty_shop.py").write_text("")
    refused = streamproc("topics", "empty_shop")
    assert refused.exit_code == 1
    assert "empty_shop holds no streamproc.App" in refused.output


@pytest.mark.kafka
def test_an_app_on_kafka_is_reset_once_its_workers_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with KafkaServer() as kafka:
        shop = Shop(tmp_path, f"kafka://{kafka.bootstrap}")
        assert streamproc("topics", shop.code(), "--create").exit_code == 0
        shop.sell("DE", "DE", "FR")
        module = shop.code()
        app = importlib.import_module(module).app

        async def while_it_runs() -> Result:
            async with running(app):
                await until(lambda: sum(count for _, count in shop.sunk()) == 3, "the orders")
                return await asyncio.to_thread(streamproc, "reset", module, "--yes")

        refused = asyncio.run(while_it_runs())
        assert refused.exit_code == 1
        assert "1 workers of orders are running" in refused.output
        assert source_lag(streamproc("lag", module).output) == 0
        assert streamproc("reset", module, "--yes").exit_code == 0
        assert "none" in streamproc("lag", module).output
        assert shop.sink.ledgers == {}
        assert shop.run(shop.code(), 3) == [("DE", 2), ("FR", 1)]
        changed = shop.code("orders=sp.count(), revenue=sp.sum('amount')")
        assert streamproc("reset", changed, "--table", "totals", "--sink-rows", "--yes").exit_code == 0
        shop.sell("FR")
        assert shop.run(changed, 1) == [("FR", 1)]


def test_an_embedded_log_in_use_is_told(shop: Shop) -> None:
    module = shop.code()

    async def scenario() -> None:
        async with log(shop.folder) as transport:
            await transport.create_topics([TopicSpec("events", 2)])
            await transport.send({TopicPartition("events", 0): [OutRecord(None, b"")]})
            refused = await asyncio.to_thread(streamproc, "reset", module, "--yes")
            assert refused.exit_code == 1
            assert "in use by another process" in refused.output

    asyncio.run(scenario())
