"""Each name of Faust and mode that we lean on is there and behaves as we think; an upgrade fails here, by name."""

from __future__ import annotations

import asyncio
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faust
import mode
import pytest
from faust import agents, tables
from faust.app.base import BootStrategy
from faust.sensors.monitor import Monitor, TableState
from faust.transport import base, conductor
from faust.types.transports import ConsumerT
from faust.web.drivers.aiohttp import Web
from mode.services import ServiceTask

from streamproc.runtime import glue
from streamproc.runtime.names import PRIVATE_NAMES


def stock() -> Any:
    return faust.App("stock", store="memory://", web_enabled=False)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_list_names_what_these_tests_cover() -> None:
    assert len(PRIVATE_NAMES) == 34
    assert version("faust-streaming").startswith("0.15.")
    assert version("mode-streaming").startswith("0.7.")


def test_every_name_in_the_list_stands_in_a_test_here() -> None:
    text = Path(__file__).read_text()
    for name in PRIVATE_NAMES:
        for last in re.findall(r"\w+", name.rpartition(".")[2]):
            assert last.strip("_") in text, f"{name} is listed and not tested"


def test_every_underscored_name_of_faust_in_the_glue_is_in_the_list() -> None:
    listed = set(re.findall(r"\b_[a-z]\w+", " ".join(PRIVATE_NAMES)))
    ours = Path(glue.__file__).parent
    faust_s = (
        faust.App,
        tables.TableManager,
        tables.Table,
        agents.Agent,
        faust.Topic,
        faust.Worker,
        conductor.Conductor,
    )
    theirs = {name for kind in faust_s for name in dir(kind) if re.fullmatch(r"_[a-z]\w+", name)}
    theirs |= set(vars(stock())) | {"_tables_finalized", "_tables_registered", "_recovery_started", "_sinks"}
    for file in (ours / "glue.py", ours / "surface.py", ours / "monitor.py", ours.parent / "app.py"):
        used = set(re.findall(r"(?:\.|def )(_[a-z]\w+)\b", file.read_text()))
        assert used & theirs <= listed | {"_declare", "_load"}, f"{file.name} leans on a name that is not listed"


def test_the_boot_strategy_s_tables_are_a_list_of_services_that_starts_last() -> None:
    app = stock()
    strategy = BootStrategy(app)
    assert strategy.tables() == [app.tables]
    assert app.BootStrategy is BootStrategy
    assert list(strategy.server())[-1] is app.tables


@pytest.mark.parametrize("name", ["_new_transport", "_new_producer_transport"])
def test_transports_are_made_once_by_a_method_without_arguments(name: str) -> None:
    made: list[str] = []

    def new(self: Any) -> Any:
        made.append(name)
        return object()

    kind = type("Mine", (faust.App,), {name: new})
    app: Any = kind("mine")
    attribute = name.removeprefix("_new_")
    assert getattr(app, attribute) is getattr(app, attribute)
    assert made == [name]


def test_in_transaction_is_a_property_that_faust_asks_before_it_sends() -> None:
    assert "in_transaction" in vars(faust.App)
    assert "self.in_transaction" in inspect.getsource(faust.App.maybe_start_producer)


def test_rebalance_callbacks_set_the_flag_and_tell_the_sensors() -> None:
    async def scenario() -> None:
        app = stock()
        assert app.rebalancing is False
        app.on_rebalance_start()
        assert app.rebalancing is True
        app.on_rebalance_return()
        app.on_rebalance_end()
        assert app.rebalancing is False
        assert isinstance(app.consumer_generation_id, int)
        assert app.on_startup_finished is None
        assert app.in_worker is False

    asyncio.run(scenario())


def test_flow_control_holds_a_channel_s_queue_until_it_is_resumed() -> None:
    async def scenario() -> None:
        app = stock()
        assert not app.flow_control.is_active()
        app.flow_control.resume()
        assert app.flow_control.is_active()

    asyncio.run(scenario())


def test_our_consumer_has_every_abstract_method_of_consumer_t_and_no_stranger() -> None:
    abstract: frozenset[str] = ConsumerT.__abstractmethods__
    assert len(abstract) >= 20
    assert not glue.Consumer.__abstractmethods__
    assert abstract <= set(dir(glue.Consumer))


def test_faust_s_consumer_keeps_unacked_messages() -> None:
    from faust.transport.consumer import Consumer

    assert "self._unacked_messages = WeakSet()" in inspect.getsource(Consumer.__init__)
    assert inspect.iscoroutinefunction(Consumer.wait_empty)


def test_a_producer_has_a_buffer_that_send_soon_fills_and_flush_empties() -> None:
    assert "self.buffer" in inspect.getsource(base.Producer.__init__)
    assert "self.buffer.put" in inspect.getsource(base.Producer.send_soon)
    assert parameters(base.Producer.send)[1:7] == ["topic", "key", "value", "partition", "timestamp", "headers"]
    assert parameters(base.Producer.send) == parameters(glue.Producer.send)
    assert parameters(base.Producer.send_and_wait) == parameters(glue.Producer.send_and_wait)
    assert parameters(base.Producer.create_topic) == parameters(glue.Producer.create_topic)


def test_the_conductor_s_subscriber_subscribes_after_agents_and_tables() -> None:
    assert isinstance(conductor.Conductor._subscriber, ServiceTask)
    text = inspect.getsource(conductor.Conductor._subscriber.fun)
    order = ["wait_until_agents_started", "wait_until_tables_registered", "consumer.subscribe("]
    assert sorted(order, key=text.index) == order


def test_a_transport_is_put_together_from_class_attributes() -> None:
    for name in ("Consumer", "Producer", "Conductor", "Fetcher"):
        assert hasattr(base.Transport, name)
    assert "self.Consumer(" in inspect.getsource(base.Transport.create_consumer)
    assert "self.Producer(" in inspect.getsource(base.Transport.create_producer)


def test_the_table_manager_has_its_three_events() -> None:
    async def scenario() -> None:
        manager = stock().tables
        for event in (manager._tables_finalized, manager._tables_registered, manager._recovery_started):
            assert isinstance(event, asyncio.Event)
            assert not event.is_set()
        manager._tables_finalized.set()
        with pytest.raises(RuntimeError, match="Too late to add tables"):
            manager.add(object())

    asyncio.run(scenario())
    assert "_tables_registered" in inspect.getsource(tables.TableManager.wait_until_tables_registered)


def test_a_start_waits_for_wait_until_recovery_completed_before_tasks_and_banner() -> None:
    assert "wait_until_recovery_completed" in inspect.getsource(faust.App._wait_for_table_recovery_completed)
    text = inspect.getsource(faust.App.on_started)
    order = ["_wait_for_table_recovery_completed", "on_started_init_extra_tasks", "on_startup_finished"]
    assert sorted(order, key=text.index) == order


def test_clean_data_is_a_service_task_of_tables() -> None:
    assert isinstance(tables.Table._clean_data, ServiceTask)


def test_an_agent_delegates_what_it_yields_to_its_sinks() -> None:
    app, seen = stock(), list[int]()

    async def never(stream: Any) -> None:
        """Never run."""

    agent = app.agent(app.channel(), sink=[seen.append])(never)

    asyncio.run(agent._delegate_to_sinks(1))
    assert seen == [1]
    assert agent._sinks == [seen.append]
    assert agent.fun.__doc__ == "Never run."


def test_replies_are_all_asked_for_through_ask_nowait() -> None:
    assert "self.ask_nowait(" in inspect.getsource(agents.Agent.ask)
    assert "self.ask_nowait(" in inspect.getsource(agents.Agent._barrier_send)
    for call in (agents.Agent.kvmap, agents.Agent.kvjoin):
        assert "_barrier_send(" in inspect.getsource(call)


def test_a_topic_prepares_key_value_and_headers_of_a_future_message() -> None:
    async def scenario() -> None:
        topic = stock().topic("t")
        assert parameters(topic.prepare_key) == ["key", "key_serializer", "schema", "headers"]
        assert parameters(topic.prepare_value) == ["value", "value_serializer", "schema", "headers"]
        assert topic.prepare_headers({"a": b"1"}) == {"a": b"1"}
        assert topic.prepare_value({"a": 1}, None, None, {}) == (b'{"a":1}', {})
        future = topic.as_future_message("k", 1, None, None, None, None, None, None, None)
        assert (future.message.key, future.message.value) == (b"k", b"1")
        future.set_result(None)
        assert await future is None

    asyncio.run(scenario())


def test_a_worker_has_a_spinner_that_may_be_absent_and_takes_redirect_stdouts() -> None:
    assert "redirect_stdouts" in parameters(faust.Worker.__init__)
    assert "if self.spinner" in inspect.getsource(faust.Worker._on_startup_end_spinner)
    from faust.cli.worker import worker

    assert worker.redirect_stdouts is True


def test_the_monitor_s_counts_are_plain_attributes() -> None:
    async def scenario() -> None:
        monitor = Monitor()
        monitor.messages_received_by_topic["t"] += 2
        monitor.events_by_task["t"] += 2
        monitor.messages_sent_by_topic["t"] += 2
        for total in ("messages_received_total", "events_total", "messages_sent"):
            assert getattr(monitor, total) == 0
        monitor.on_tp_commit({faust.types.TP("t", 0): 3})
        assert monitor.asdict()["topic_committed_offsets"] == {"t": {0: 3}}
        assert monitor.tp_read_offsets == {}
        state: Any = monitor.on_commit_initiated(None)  # type: ignore[arg-type]
        monitor.on_commit_completed(None, state)  # type: ignore[arg-type]
        assert len(monitor.commit_latency) == 1
        table: Any = stock().Table("t")
        assert TableState(table).asdict() == {"keys_retrieved": 0, "keys_updated": 0, "keys_deleted": 0}

    asyncio.run(scenario())


def test_the_web_server_is_an_aiohttp_application() -> None:
    assert "self.web_app: Application" in inspect.getsource(Web.__init__)


def test_the_assignor_tells_external_topics_metadata() -> None:
    from faust.assignor.partition_assignor import PartitionAssignor

    assert parameters(PartitionAssignor.external_topics_metadata) == ["self"]


def test_wait_for_stopped_waits_for_an_asyncio_event() -> None:
    class Mine(mode.Service):
        pass

    async def scenario() -> None:
        service, event = Mine(), asyncio.Event()
        await service.start()
        event.set()
        assert await service.wait_for_stopped(event) is False  # type: ignore[arg-type]
        await service.stop()
        assert await service.wait_for_stopped(asyncio.Event()) is True  # type: ignore[arg-type]

    asyncio.run(scenario())


def test_the_leader_hands_its_assignment_through_one_method_and_members_know_their_standbys() -> None:
    app = stock()
    app.tables  # noqa: B018 - the assignor reads it
    assignor = app.assignor
    assert parameters(assignor._global_table_standby_assignments) == ["assignments", "partitions_by_topic"]
    assert "self._global_table_standby_assignments(" in inspect.getsource(type(assignor)._perform_assignment)
    assert assignor._decompress(assignor._compress(b"metadata")) == b"metadata"
    assert assignor.assigned_standbys() == set()
    assert "assert metadata.url == str(self._url)" in inspect.getsource(type(assignor).on_assignment)
