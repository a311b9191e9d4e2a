"""What a user of Faust touches, on our data path: topic, table, agent. Subclasses of Faust's own; no patching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import faust
from faust import agents, tables, topics
from mode import Service

from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of
from streamproc.core.types import TopicPartition
from streamproc.eventtime.spec import EventTime
from streamproc.runtime.agentwork import CURRENT, AgentSpec, TaskStream
from streamproc.transport.contract import OutRecord

if TYPE_CHECKING:
    from streamproc.runtime.runtime import Runtime

__all__ = ["Agent", "Table", "TableManager", "Topic", "ValueEncoder"]

Headers = tuple[tuple[str, bytes | None], ...]


class ValueEncoder(Protocol):
    """`avro.encode.Encoder`, or one that is made at the first send."""

    def encode(self, value: Any) -> bytes: ...


class Topic(topics.Topic):
    """A topic with a schema and an event time, both shared by all who read it."""

    value_schema: Any = None
    """The parsed Avro schema, or None: values are what Faust's serializers make of them."""
    event_time: EventTime | None = None
    encoder: ValueEncoder | None = None
    where: str = ""
    declared_partitions: int | None = None

    async def send(self, *, key: Any = None, value: Any = None, partition: int | None = None,
                   timestamp: float | None = None, headers: Any = None, **options: Any) -> Awaitable[Any]:  # fmt: skip
        """Inside an agent: part of its epoch's transaction, written when the epoch commits, or never. Elsewhere: at once.

        The result of the awaitable is None inside an agent: there is no offset before the commit.
        """
        record = self._out(key, value, timestamp, headers)
        runtime: Runtime = self.app.runtime  # type: ignore[attr-defined]
        instance = CURRENT.get(None)
        name = self.get_topic_name()
        count = await runtime.partition_count(name)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if instance is not None:
            if instance.overlays is not instance.work.overlays:
                raise RuntimeError(f"Agent {instance.spec.name} was given up and can no longer send.")
            at = _choose(record.key, partition, count, instance.work.partition % count)
            instance.work.send(TopicPartition(name, at), record)
            done.set_result(None)
            return done
        at = _choose(record.key, partition, count, runtime.next_partition(name) % count)
        tp = TopicPartition(name, at)
        offsets = await runtime.transport.send({tp: [record]})
        done.set_result(faust.types.RecordMetadata(name, at, faust.types.TP(name, at), offsets[tp]))
        return done

    def _out(self, key: Any, value: Any, timestamp: float | None, headers: Any) -> OutRecord:
        raw_key = key if isinstance(key, bytes) or key is None else str(key).encode()
        if self.encoder is not None and value is not None:
            raw_value: bytes | None = self.encoder.encode(value)
        else:
            raw_value, headers = self.prepare_value(value, None, headers=dict(headers or {}))
        pairs: Headers = tuple(dict(headers or {}).items())
        return OutRecord(raw_key, raw_value, pairs, None if timestamp is None else round(timestamp * 1000))


def _choose(key: bytes | None, partition: int | None, count: int, without_key: int) -> int:
    if partition is not None:
        return partition
    return partition_of(key, count) if key is not None else without_key


class Table(tables.Table[Any, Any]):
    """Faust's mapping over the task's overlay: `table[key] += 1` is part of the epoch or did not happen."""

    where: str = ""

    def _rows(self) -> Any:
        instance = CURRENT.get(None)
        if instance is None:
            raise UserError(
                f"Table {self.name} is written and read inside an agent of this app only.",
                remedy="From a web page or a timer, read it with `table.committed(key)`.",
                where=self.where,
            )
        return instance.overlays[self.name]

    def committed(self, key: Any, default: Any = None) -> Any:
        """The committed value of ``key`` if a task of this worker holds it."""
        runtime: Runtime = self.app.runtime  # type: ignore[attr-defined]
        return runtime.committed(self.name, key, default)

    def __getitem__(self, key: Any) -> Any:
        return self._rows()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._rows()[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._rows()[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._rows()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())

    def get(self, key: Any, default: Any = None) -> Any:
        return self._rows().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        return self._rows().pop(key, *default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        return self._rows().setdefault(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def items(self) -> Any:
        return self._rows().items()

    def using_window(self, window: Any, *, key_index: bool = False) -> Any:
        raise UserError(
            f"Table {self.name}: windowed tables of the per-record API are not there yet.",
            remedy="Put the window's start into the key, or declare a pipeline with .window(…).",
            where=self.where,
        )

    async def on_start(self) -> None:
        """Topics are declared, stores opened and restored by the runtime."""

    async def on_rebalance(self, *args: Any, **kwargs: Any) -> None:
        """The runtime's tasks do it."""

    @Service.task
    async def _clean_data(self) -> None:
        """Nothing leaves a table by the wall clock. (mode insists that a task is overridden by a task.)"""
        return


class TableManager(tables.TableManager):
    """Faust's registry of tables, without its recovery: tasks restore themselves."""

    async def on_start(self) -> None:
        self._tables_finalized.set()
        for table in self.values():
            await table.maybe_start()
        self._tables_registered.set()

    async def on_stop(self) -> None:
        for table in self.values():
            await table.stop()

    def on_partitions_revoked(self, revoked: Any) -> None:
        """The runtime's listener has closed the tasks already."""

    async def on_rebalance(self, *args: Any, **kwargs: Any) -> None:
        self._recovery_started.set()

    async def wait_until_recovery_completed(self) -> bool:
        runtime: Runtime = self.app.runtime  # type: ignore[attr-defined]
        return bool(await self.wait_for_stopped(runtime.ready))  # type: ignore[arg-type]


class Agent(agents.Agent):
    """Declared as Faust's; run by the tasks, one instance each, so that Faust starts no actor of its own."""

    where: str = ""

    async def on_start(self) -> None:
        """Instances are made by the tasks."""

    async def on_stop(self) -> None:
        """Instances end with their tasks."""

    def cancel(self) -> None:
        """Likewise."""

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Likewise."""

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Likewise."""

    def spec(self) -> AgentSpec:
        """What the runtime runs."""
        if self.concurrency > 1:
            raise UserError(
                f"Agent {self.name} has concurrency={self.concurrency}.",
                remedy="A task runs each agent once; add partitions and workers instead.",
                where=self.where,
            )
        return AgentSpec(self.name, tuple(self.get_topic_names()), self._run, self.where)

    async def _run(self, stream: TaskStream) -> None:
        result = self.fun(stream)  # type: ignore[arg-type]
        if isinstance(result, AsyncIterable):
            async for value in result:
                await self._delegate_to_sinks(value)
        else:
            await result
