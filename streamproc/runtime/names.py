"""Every name of Faust and mode that we override, read or call although their documentation does not promise it.

Both are pinned to one minor version; `tests/test_faust_names.py` holds each of these against the installed one, so that
an upgrade fails there, by name, and not in a rebalance.
"""

from __future__ import annotations

from typing import Final

__all__ = ["PRIVATE_NAMES"]

PRIVATE_NAMES: Final[dict[str, str]] = {
    "faust.app.base.BootStrategy.tables": "the services that start last: our runtime is added there",
    "faust.App._new_transport": "made on demand behind App.transport: ours, whatever the broker's scheme",
    "faust.App._new_producer_transport": "the same behind App.producer_transport",
    "faust.App.in_transaction": "Faust's own transactions: off",
    "faust.App.on_rebalance_start, _return, _end": "called by our membership as Faust's consumer would",
    "faust.App.consumer_generation_id": "set at an assignment; sends carry it",
    "faust.App.on_startup_finished, in_worker": "whether a worker runs the app",
    "faust.App.flow_control": "resumed once the tasks are restored: until then in-memory channels stand still",
    "faust.types.transports.ConsumerT": "its abstract methods, all of which our consumer has",
    "faust.transport.consumer.Consumer._unacked_messages": "read by Faust's stream iterator over in-memory channels",
    "faust.transport.base.Producer.buffer": "where send_soon puts a message; flushed at a stop",
    "faust.transport.conductor.Conductor._subscriber": "calls consumer.subscribe once, after agents and tables",
    "faust.transport.base.Transport.Consumer, Producer": "class attributes by which a transport is put together",
    "faust.tables.TableManager._tables_finalized": "set: no table may be added any more",
    "faust.tables.TableManager._tables_registered": "set: the conductor goes on to subscribe",
    "faust.tables.TableManager._recovery_started": "set at a rebalance",
    "faust.tables.TableManager.wait_until_recovery_completed": "what app tasks, timers and the ready banner wait for",
    "faust.tables.Table._clean_data": "expiry by the wall clock; mode lets only a Service.task override it",
    "faust.agents.Agent._delegate_to_sinks": "sends what an agent yielded to its sinks",
    "faust.agents.Agent._sinks": "whether it has any",
    "faust.agents.Agent.fun": "the user's function",
    "faust.agents.Agent.ask_nowait": "all calls that wait for a reply come through it",
    "faust.Topic.as_future_message": "key, value, headers and callback of a send_soon",
    "faust.Topic.prepare_key, prepare_value, prepare_headers": "how a send serializes; without values in the arguments",
    "faust.Worker.spinner": "the progress line",
    "faust.Worker.redirect_stdouts": "an argument that Faust's command line always gives as true",
    "faust.sensors.monitor.Monitor": "its counters, which are plain attributes",
    "faust.sensors.monitor.TableState": "keys updated and deleted of one table",
    "faust.web.drivers.aiohttp.Web.web_app": "the aiohttp application that the web view is mounted on",
    "faust.assignor.PartitionAssignor.external_topics_metadata": "which worker has which partitions, by its URL",
    "faust.assignor.PartitionAssignor._global_table_standby_assignments": "the leader's last step before it sends: standbys",
    "faust.assignor.PartitionAssignor._compress, _decompress": "of the metadata that goes with an assignment",
    "faust.assignor.PartitionAssignor.assigned_standbys": "which partitions are to be kept warm here",
    "mode.Service.wait_for_stopped": "waits for an asyncio.Event or the service's end",
}
