"""What Faust offers around the data path works on ours: timers, tasks, pages, commands, sends, sensors, settings, topics."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import aiohttp
import faust
import pytest
from faust.sensors.base import Sensor

import streamproc as sp
from streamproc.core.errors import UserError
from streamproc.transport.contract import OutRecord, TopicSpec
from tests.apps import log, new_app, read_all, running, until, write

MODULE = """
import os
import streamproc as sp

app = sp.App("shop", broker="embedded://log", commit_interval="50ms")
words = app.topic("words", partitions=2)
counts = app.Table("counts", default=int, help="how often")


class Word(__import__("faust").Record):
    text: str


@app.agent(words)
async def count(stream):
    "Counts words."
    async for word in stream:
        counts[word] += 1
        print("counted", word, counts[word], flush=True)


@app.task
async def started():
    print("state in", app.conf.datadir.name, "port", app.conf.web_port, flush=True)


@app.command()
async def hello():
    "Say hello."
    print("hello from", app.conf.id)


if __name__ == "__main__":
    app.main()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(MODULE)
    return tmp_path


def command(folder: Path, *args: str, module: str = "shop", **env: str) -> str:
    """What ``faust -A shop …`` prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "faust", "-A", module, *args], cwd=folder, env={**os.environ, **env}, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Worker:
    """``faust -A shop worker`` as a process of its own, its output line by line."""

    def __init__(self, folder: Path, *args: str, **env: str) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "faust", *args], cwd=folder, env={**os.environ, **env}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def line_with(self, text: str) -> str:
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if text in line:
                return line
        raise AssertionError(f"the worker ended without {text!r}: {''.join(seen)}")

    def stop(self) -> tuple[int, str, float]:
        """Exit code, the rest of its output, and how long it took."""
        began = time.monotonic()
        self.process.terminate()
        rest, _ = self.process.communicate(timeout=30)
        return self.process.returncode, rest, time.monotonic() - began


def test_faust_s_own_commands_list_what_the_app_has(shop: Path) -> None:
    assert "@count" in command(shop, "agents")
    tables = command(shop, "tables")
    assert "counts" in tables
    assert "how often" in tables
    assert "Word" in command(shop, "models")
    assert "text" in command(shop, "model", "shop.Word")
    assert command(shop, "hello") == "hello from shop\n"


def test_a_worker_counts_what_the_send_command_wrote_prints_plainly_and_stops_soon(shop: Path) -> None:
    sent = command(shop, "send", "words", '"a"', "--key", "k", "--repeat", "2")
    assert [json.loads(line)["topic"] for line in sent.splitlines() if line.startswith("{")] == ["words", "words"]
    command(shop, "send", "@count", '"b"', "--partition", "1")
    worker = Worker(shop, "-A", "shop", "worker", "--without-web")
    worker.line_with("counted a 2")
    seconds = time.monotonic() - worker.began
    code, rest, stop_s = worker.stop()
    print(f"start to first record {seconds:.2f} s, stop {stop_s:.2f} s")
    assert code == 0
    assert "Traceback" not in rest
    assert seconds < 10, "2 s on a machine with nothing else to do; this one may have"
    assert stop_s < 6


def test_a_worker_started_again_on_its_datadir_goes_on(shop: Path) -> None:
    for expected in (1, 2):
        command(shop, "send", "words", '"a"')
        worker = Worker(shop, "-A", "shop", "worker", "--without-web")
        assert worker.line_with("counted") == f"counted a {expected}\n"
        assert worker.stop()[0] == 0


def test_settings_come_from_the_command_line_and_the_environment(shop: Path) -> None:
    port = free_port()
    worker = Worker(shop, "-A", "shop", "--datadir", "elsewhere", "worker", "--web-port", str(port))
    assert worker.line_with("state in") == f"state in elsewhere port {port}\n"
    assert worker.stop()[0] == 0
    assert (shop / "elsewhere").is_dir()
    worker = Worker(
        shop, "-A", "shop", "worker", FAUST_DATADIR="third", WEB_PORT=str(port), BROKER_URL="embedded://other"
    )
    assert worker.line_with("state in") == f"state in third port {port}\n"
    assert worker.stop()[0] == 0
    assert list(shop.glob("other*")), "the broker of the environment is the log that was used"


def test_a_program_that_calls_main_is_a_worker_too(shop: Path) -> None:
    command(shop, "send", "words", '"a"')
    done = subprocess.Popen([sys.executable, "shop.py", "worker", "--without-web"], cwd=shop, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        assert done.stdout is not None
        assert any("counted a 1" in line for line in done.stdout)
    finally:
        done.terminate()
        done.communicate(timeout=30)


def test_defaults_are_faust_s_but_for_what_keeps_the_promises(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        app = sp.App("orders", broker=f"embedded://{tmp_path}/log", processing_guarantee="exactly_once")
        stock = faust.App("orders")
        conf, faust_s = app.conf, stock.conf
    current = [name for name, setting in conf.SETTINGS.items() if not setting.deprecated]
    ours = {name for name in current if getattr(conf, name, None) != getattr(faust_s, name, None)}
    assert ours <= {
        "Agent", "Table", "TableManager", "Topic", "Worker", "broker", "broker_consumer", "broker_producer", "store",
        "broker_session_timeout", "broker_heartbeat_interval", "web_bind", "web_host", "worker_redirect_stdouts",
        "canonical_url", "reply_to", "node_hostname", "PartitionAssignor", "table_standby_replicas",
    }  # fmt: skip
    assert conf.web_bind == "127.0.0.1"
    assert not app.in_transaction, "Faust's own transactions stay off; ours are always on"


def test_timers_tasks_and_leader_tasks_run_and_cron_jobs_are_registered(tmp_path: Path) -> None:
    app = new_app(tmp_path, topic_disable_leader=False)
    ran: list[str] = []

    @app.timer(interval=0.05)
    async def tick() -> None:
        ran.append("timer")

    @app.timer(0.05, on_leader=True)
    async def leading() -> None:
        ran.append("leader timer")

    @app.task
    async def once(given: Any) -> None:
        ran.append(f"task of {given.conf.id}")

    @app.task(on_leader=True)
    async def once_on_leader() -> None:
        ran.append("leader task")

    @app.crontab("0 0 1 1 *")
    async def new_year() -> None:
        ran.append("cron")

    async def scenario() -> None:
        async with running(app):
            assert app.is_leader()
            await until(lambda: {"timer", "leader timer", "leader task"} <= set(ran), "timers and tasks")
            await until(lambda: ran.count("timer") > 2, "the timer again")
        assert "task of test" in ran
        assert "cron" not in ran
        assert ran.count("leader task") == 1

    asyncio.run(scenario())


def test_signals_are_sent_around_the_assignment(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    app.topic("in", partitions=1)
    source = app.topic("in")
    sent: list[str] = []

    @app.agent(source)
    async def read(stream: Any) -> None:
        async for _ in stream:
            pass

    @app.on_partitions_assigned.connect
    async def assigned(app: Any, /, *args: Any, signal: Any, **kwargs: Any) -> None:
        sent.append(f"assigned {sorted(tuple(tp) for tp in args[0])}")

    @app.on_rebalance_complete.connect
    async def complete(app: Any, /, *args: Any, signal: Any, **kwargs: Any) -> None:
        sent.append("complete")

    @app.on_before_shutdown.connect
    async def shutdown(app: Any, /, *args: Any, signal: Any, **kwargs: Any) -> None:
        sent.append("shutdown")

    @app.on_worker_init.connect
    def init(app: Any, /, *args: Any, signal: Any, **kwargs: Any) -> None:
        sent.append("init")

    async def scenario() -> None:
        async with running(app):
            await until(lambda: "complete" in sent, "the signals")
        assert sent == ["init", "assigned [('in', 0)]", "complete", "shutdown"]

    app.worker_init_post_autodiscover()
    asyncio.run(scenario())


def test_a_page_reads_the_committed_value_of_a_table(tmp_path: Path) -> None:
    port = free_port()
    app = new_app(tmp_path, web_enabled=True, web_port=port)
    counts = app.Table("counts", default=int)

    @app.agent(app.topic("in", partitions=1))
    async def count(stream: Any) -> None:
        async for word in stream:
            counts[word] += 1

    @app.page("/count/{word}")
    async def show(web: Any, request: Any, word: str) -> Any:
        return web.json({"count": counts.committed(word, 0)})

    async def get(path: str) -> Any:
        async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}{path}") as answer:
            assert answer.status == 200
            return await answer.json()

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, OutRecord(None, b'"a"'))] * 3)
        async with running(app):
            await until(lambda: counts.committed("a") == 3, "the commit")
            assert await get("/count/a") == {"count": 3}
            assert await get("/count/b") == {"count": 0}

    asyncio.run(scenario())


def test_sends_outside_of_agents_keep_partition_key_headers_timestamp_and_serializer(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    out = app.topic("out", partitions=3)
    coded = app.topic("coded", partitions=1, key_serializer="json", value_serializer="raw")
    called: list[Any] = []

    async def scenario() -> None:
        async with running(app):
            await (await app.producer.send("out", b"k", b"raw", 0, 1.5, {"h": b"1"}))
            sent = await (await out.send(key="k", value={"n": 1}, partition=2, timestamp=2.25, headers={"h": "é"}))
            assert (sent.topic, sent.partition, sent.offset) == ("out", 2, 0)
            await out.send(key=42, value=None, partition=1, headers=[("a", b"1"), ("a", b"2")], callback=called.append)
            out.send_soon(key="later", value=1, partition=2)
            await app.send("out", key=b"b", value="by name", partition=0)
            await coded.send(key={"id": 1}, value=b"bytes")
            await until(lambda: out.app.producer.buffer.size == 0, "the buffer")
            await asyncio.sleep(0.05)
            found = await read_all(app.runtime.transport, "out")
            assert [row[:3] for row in found] == [
                (0, b"k", b"raw"), (0, b"b", b'"by name"'), (1, b"42", b"null"), (2, b"k", b'{"n":1}'), (2, b"later", b"1"),
            ]  # fmt: skip
            assert found[0][3] == {"h": b"1"}
            assert found[3][3] == {"h": "é".encode()}
            assert [row[:3] for row in await read_all(app.runtime.transport, "coded")] == [(0, b'{"id":1}', b"bytes")]
            assert len(called) == 1
            assert app.monitor.messages_sent_by_topic["out"] == 4

    asyncio.run(scenario())


def test_a_second_declaration_of_a_name_writes_by_the_first_one_s_schema(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    app.topic("events", value_schema="event.avsc", partitions=1)

    async def scenario() -> None:
        async with running(app):
            record = {"id": "1", "country": "FR", "amount": 1.0, "at": None}
            await app.send("events", value=record)
            await app.topic("events").send(value=json.dumps(record))
            await app.topic("events").send(key="gone", value=None)
            values = [value for _, _, value, _ in await read_all(app.runtime.transport, "events")]
        assert values[0] == values[1]
        assert values[0] is not None
        assert values[0][:5] == b"\0\0\0\0\1"
        assert values[2] is None
        with pytest.raises(UserError, match="not the JSON of a record"):
            await app.topic("events").send(value="no record")

    asyncio.run(scenario())


def test_sinks_get_what_agents_yield_inside_the_transaction(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    out = app.topic("out", partitions=2)
    seen: list[Any] = []

    @app.agent(name="last")
    async def last(stream: Any) -> None:
        async for value in stream:
            seen.append(value)

    @app.agent(app.topic("in", partitions=2), sink=[out, last, seen.append], name="double")
    async def double(stream: Any) -> Any:
        async for number in stream:
            out.send_soon(key="soon", value=number)
            yield number * 2

    async def scenario() -> None:
        await write(tmp_path, "in", 2, [(i % 2, OutRecord(None, b"%d" % i)) for i in range(4)])
        async with running(app):
            await until(lambda: sorted(seen) == [0, 0, 2, 2, 4, 4, 6, 6], "the sinks")
            values = sorted(json.loads(row[2] or b"") for row in await read_all(app.runtime.transport, "out"))
        assert values == sorted([0, 2, 4, 6, 0, 1, 2, 3])
        assert await partitions_of(tmp_path, "test-last") == 2, "an agent's own topic follows the other agents' topics"

    asyncio.run(scenario())


async def partitions_of(folder: Path, topic: str) -> int | None:
    async with log(folder) as transport:
        return await transport.partitions(topic)


def test_agents_are_sent_to_by_name_and_read_topics_named_by_text(tmp_path: Path) -> None:
    app = new_app(tmp_path, topic_partitions=3)
    seen: list[Any] = []

    @app.agent()
    async def own(stream: Any) -> None:
        async for value in stream:
            seen.append(value)

    @app.agent("named")
    async def named(stream: Any) -> None:
        async for value in stream:
            seen.append(value)

    async def scenario() -> None:
        async with running(app):
            await own.send(value=1, key="k")
            await own.cast({"b": 2})
            await named.send(value=3, partition=2)
            await until(lambda: len(seen) == 3, "what was sent")
            with pytest.raises(UserError, match=r"test_faust_keeps_working\.py:\d+: Agent .*own is asked for a reply"):
                await own.ask(1)
        assert await partitions_of(tmp_path, "named") == 3

    asyncio.run(scenario())
    assert sorted(map(str, seen)) == ["1", "3", "{'b': 2}"]


def test_channels_and_lists_are_streamed_in_tasks_and_by_agents_over_channels(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    channel, other = app.channel(), app.channel()
    seen: list[Any] = []

    @app.task
    async def lists() -> None:
        async for value in app.stream([1, 2, 3]):
            seen.append(value)

    @app.task
    async def streamed() -> None:
        async for value in app.stream(channel):
            seen.append(value)

    @app.agent(other)
    async def on_channel(stream: Any) -> None:
        async for value in stream:
            seen.append(value)

    async def scenario() -> None:
        async with running(app):
            await until(lambda: 3 in seen, "the tasks: what is sent before has no subscriber, as in Faust")
            await channel.send(value="a")
            await other.send(value="b")
            await until(lambda: set(seen) == {1, 2, 3, "a", "b"}, "all of it")

    asyncio.run(scenario())


def test_a_topic_outside_of_an_agent_is_refused_by_name(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    topic = app.topic("in", partitions=1)
    with pytest.raises(UserError, match=r"test_faust_keeps_working\.py:\d+: Topic in is iterated outside"):
        app.stream(topic)
    for refused in (app.SetTable, app.GlobalTable, app.SetGlobalTable):
        with pytest.raises(UserError, match="is not there yet"):
            refused("t")


def test_the_monitor_counts_and_sensors_are_told_of_commits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = new_app(tmp_path)
    counts = app.Table("counts", default=int)
    out = app.topic("out", partitions=1)
    told: list[str] = []

    class Mine(Sensor):
        def on_commit_completed(self, consumer: Any, state: Any) -> None:
            told.append("commit")

        def on_rebalance_end(self, app: Any, state: Any) -> None:
            told.append("rebalance")

        def on_message_in(self, tp: Any, offset: int, message: Any) -> None:
            told.append("message")

    app.sensors.add(Mine())

    @app.agent(app.topic("in", partitions=1))
    async def count(stream: Any) -> None:
        async for word in stream:
            counts[word] += 1
            await out.send(value=word)

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, OutRecord(None, b'"ab"'))] * 5)
        async with running(app):
            await until(lambda: counts.committed("ab") == 5 and app.monitor.events_total, "the commit")
            monitor = app.monitor
            assert monitor.messages_received_total == monitor.messages_received_by_topic["in"] == 5
            assert monitor.events_total == 5
            assert monitor.messages_sent_by_topic["out"] == 5
            assert 1 <= monitor.tables["counts"].keys_updated <= 5
            assert monitor.tp_committed_offsets[faust.types.TP("in", 0)] == 5
            assert len(monitor.commit_latency) == told.count("commit") >= 1
            json.dumps({key: str(value) for key, value in monitor.asdict().items()})
        assert "rebalance" in told
        assert "message" not in told

    asyncio.run(scenario())
    assert "Mine overrides on_message_in" in caplog.text


def test_a_reset_removes_the_local_state_and_the_next_start_restores_it(tmp_path: Path) -> None:
    def build() -> Any:
        app = new_app(tmp_path)
        counts = app.Table("counts", default=int)

        @app.agent(app.topic("in", partitions=1), name="count")
        async def count(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1

        return app

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, OutRecord(None, b'"a"'))] * 3)
        async with running(app := build()):
            await until(lambda: app.tables["counts"].committed("a") == 3, "the commit")
        assert list(app.state_folder.iterdir())
        app.tables["counts"].reset_state()
        assert not list(app.state_folder.iterdir())
        async with running(app := build()):
            await until(app.runtime.ready.is_set, "the restore")
            assert app.tables["counts"].committed("a") == 3

    asyncio.run(scenario())


def test_topics_are_made_as_declared(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    app.topic("kept", partitions=3, retention=3600, config={"max.message.bytes": 2_000_000})
    app.topic("compacted", partitions=1, compacting=True)
    app.topic("test-mine", partitions=1, compacting=True, deleting=True)
    late = app.topic("declared-later", partitions=2)

    async def scenario() -> None:
        async with running(app):
            await until(app.runtime.ready.is_set, "the start")
            await late.declare()
            await late.maybe_declare()
        async with log(tmp_path) as transport:
            for topic, partitions, config in (
                ("kept", 3, {"retention.ms": "3600000", "max.message.bytes": "2000000"}),
                ("compacted", 1, {"cleanup.policy": "compact"}),
                ("test-mine", 1, {"cleanup.policy": "compact,delete"}),
                ("declared-later", 2, {}),
            ):
                await transport.create_topics([TopicSpec(topic, partitions, config)])  # raises if it is otherwise
            with pytest.raises(UserError, match=r"retention\.ms=3600000"):
                await transport.create_topics([TopicSpec("kept", 3, {"retention.ms": "1"})])

    asyncio.run(scenario())
