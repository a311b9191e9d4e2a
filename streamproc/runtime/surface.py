"""What a user of Faust touches, on our data path: topic, table, agent. Subclasses of Faust's own; no patching."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterable, Awaitable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from faust import agents, tables, topics
from faust.types import TopicT
from mode import Service, want_seconds

from streamproc.core import limits
from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of
from streamproc.core.types import TopicPartition
from streamproc.eventtime.spec import EventTime
from streamproc.runtime.agentwork import CURRENT, AgentSpec, Instance, OnFail, TaskStream
from streamproc.runtime.topology import AGENTS
from streamproc.transport.contract import OutRecord, TopicSpec

if TYPE_CHECKING:
    from streamproc.runtime.runtime import Runtime

__all__ = ["Agent", "Table", "TableManager", "Topic", "ValueEncoder", "header_pairs", "topic_config"]

_current = CURRENT.get
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
                   timestamp: float | None = None, headers: Any = None, schema: Any = None, key_serializer: Any = None,
                   value_serializer: Any = None, callback: Any = None, force: bool = False) -> Awaitable[Any]:  # fmt: skip
        """Inside an agent: part of its epoch's transaction, written when the epoch commits, or never. Elsewhere: at once,
        by the app's producer, as Faust does it.

        The result of the awaitable is None inside an agent: there is no offset before the commit.
        """
        instance = CURRENT.get(None)
        if instance is None:
            return await super().send(
                key=key, value=value, partition=partition, timestamp=timestamp, headers=headers, schema=schema,
                key_serializer=key_serializer, value_serializer=value_serializer, callback=callback, force=force,
            )  # fmt: skip
        runtime: Runtime = self.app.runtime  # type: ignore[attr-defined]
        count = await runtime.partition_count(self.get_topic_name())
        out = self._out(key, value, timestamp, headers, schema, key_serializer, value_serializer)
        self._into_epoch(instance, out, partition, count)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def send_soon(self, *, key: Any = None, value: Any = None, partition: int | None = None,
                  timestamp: float | None = None, headers: Any = None, schema: Any = None, key_serializer: Any = None,
                  value_serializer: Any = None, callback: Any = None, force: bool = False,
                  eager_partitioning: bool = False) -> Any:  # fmt: skip
        """`send` without an await; inside an agent the topic must have been declared when the app started."""
        instance = CURRENT.get(None)
        if instance is None:
            return super().send_soon(
                key=key, value=value, partition=partition, timestamp=timestamp, headers=headers, schema=schema,
                key_serializer=key_serializer, value_serializer=value_serializer, callback=callback, force=force,
                eager_partitioning=eager_partitioning,
            )  # fmt: skip
        runtime: Runtime = self.app.runtime  # type: ignore[attr-defined]
        name = self.get_topic_name()
        if not runtime.knows(name):
            raise UserError(
                f"Topic {name} was declared after the app had started: its partitions are not known yet.",
                remedy="Declare it at module level, or use `await topic.send(…)`.",
                where=self.where,
            )
        sent = self.as_future_message(key, value, partition, timestamp, headers, schema, key_serializer, value_serializer,
                                      callback)  # fmt: skip
        out = self._out(key, value, timestamp, headers, schema, key_serializer, value_serializer)
        self._into_epoch(instance, out, partition, runtime.known_partitions(name))
        sent.set_result(None)  # type: ignore[arg-type]
        return sent

    def _into_epoch(self, instance: Instance, out: OutRecord, partition: int | None, count: int) -> None:
        if instance.overlays is not instance.work.overlays:
            raise RuntimeError(f"Agent {instance.spec.name} has no record in hand, or was given up: it cannot send.")
        at = _choose(out.key, partition, count, instance.work.partition % count)
        instance.work.send(TopicPartition(self.get_topic_name(), at), out)

    def _out(self, key: Any, value: Any, timestamp: float | None, headers: Any, schema: Any, key_serializer: Any,
             value_serializer: Any) -> OutRecord:  # fmt: skip
        given = self.prepare_headers(headers)
        raw_key, given = self.prepare_key(key, key_serializer, schema, given)
        raw_value, given = self.prepare_value(value, value_serializer, schema, given)
        return OutRecord(
            raw_key, raw_value, header_pairs(given), None if timestamp is None else round(timestamp * 1000)
        )

    def prepare_key(self, key: Any, key_serializer: Any, schema: Any = None, headers: Any = None) -> tuple[Any, Any]:
        """Faust's; where it would take bytes only, anything else is its text, so that ``key=42`` is ``b"42"``."""
        if key is None or isinstance(key, bytes):
            return key, headers
        if schema is None and key_serializer is None and self._text_keys:
            return str(key).encode(), headers
        return super().prepare_key(key, key_serializer, schema, headers)

    @cached_property
    def _text_keys(self) -> bool:
        plain = self.schema is None or (self.schema.key_type is None and self.schema.key_serializer is None)
        return plain and self.app.conf.key_serializer in (None, "raw")

    def prepare_value(
        self, value: Any, value_serializer: Any, schema: Any = None, headers: Any = None
    ) -> tuple[Any, Any]:
        """By the Avro schema, if there is one; None is a tombstone then, and text (``faust send``) is the record's JSON."""
        if self.encoder is None or value_serializer is not None or schema is not None:
            return super().prepare_value(value, value_serializer, schema, headers)
        if isinstance(value, str):
            value = _record_of(value, self)
        return (None if value is None else self.encoder.encode(value)), headers

    def encode(self, value: Any) -> bytes | None:
        """The bytes that `send` writes for ``value``."""
        encoded: bytes | None = self.prepare_value(value, None)[0]
        return encoded

    def __aiter__(self) -> Any:
        raise UserError(
            f"Topic {self} is iterated outside of an agent: records are handed out inside of a task's transaction only.",
            remedy="Write an agent, `@app.agent(topic)`, or a pipeline, `app.pipeline(topic)`.",
            where=self.where,
        )

    def spec(self) -> TopicSpec:
        """As declared, for its creation; partitions 0 where the declaration leaves the number open."""
        config = topic_config(self.config, self.retention, self.compacting, self.deleting)
        return TopicSpec(self.get_topic_name(), self.declared_partitions or 0, config)


def topic_config(
    config: Mapping[str, Any] | None, retention: Any, compacting: bool | None, deleting: bool | None
) -> dict[str, str]:
    """What Faust's arguments mean in Kafka's own names; an entry of ``config`` wins."""
    settings: dict[str, str] = {}
    if policies := [name for name, chosen in (("compact", compacting), ("delete", deleting)) if chosen]:
        settings["cleanup.policy"] = ",".join(policies)
    if retention is not None:
        settings["retention.ms"] = str(round(want_seconds(retention) * 1000))
    return {**settings, **{name: _setting(value) for name, value in (config or {}).items()}}


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def header_pairs(headers: Any) -> Headers:
    """Headers as they are written, from a mapping or pairs; text is UTF-8. A name may come more than once in pairs."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
    return tuple((name, value.encode() if isinstance(value, str) else value) for name, value in pairs)


def _record_of(text: str, topic: Topic) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as broken:
        raise UserError(
            f"The value for {topic} is text and not the JSON of a record: {broken}.",
            remedy=f'Its schema wants a record, such as {{"{next(iter(topic.value_schema.root.fields)).name}": …}}.',
            where=topic.where,
        ) from broken


def _choose(key: bytes | None, partition: int | None, count: int, without_key: int) -> int:
    if partition is not None:
        return partition
    return partition_of(key, count) if key is not None else without_key


class Table(tables.Table[Any, Any]):
    """Faust's mapping over the task's overlay: `table[key] += 1` is part of the epoch or did not happen."""

    where: str = ""

    def _rows(self) -> Any:
        return (_current(None) or self._nobody()).overlays[self.name]

    def _nobody(self) -> Instance:
        raise UserError(
            f"Table {self.name} is written and read inside an agent of this app only.",
            remedy="From a web page or a timer, read it with `table.committed(key)`.",
            where=self.where,
        )

    def committed(self, key: Any, default: Any = None) -> Any:
        """The committed value of ``key`` if a task of this worker holds it."""
        runtime: Runtime = self.app.runtime  # type: ignore[attr-defined]
        return runtime.committed(self.name, key, default)

    # These two are what an agent does with most records: `_rows`, without a call of its own.

    def __getitem__(self, key: Any) -> Any:
        return (_current(None) or self._nobody()).overlays[self.name][key]

    def __setitem__(self, key: Any, value: Any) -> None:
        (_current(None) or self._nobody()).overlays[self.name][key] = value

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

    def reset_state(self) -> None:
        """For ``faust reset``, with the worker stopped: the agents' local stores go; a start restores them from the log."""
        app: Any = self.app
        for folder in app.state_folder.glob(f"{AGENTS}-*"):
            shutil.rmtree(folder)

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
    """Declared as Faust's; run by the tasks, one instance each, so that Faust starts no actor of its own.

    An agent over an in-memory channel is all Faust's: it belongs to no task, writes no table and reads no topic.
    """

    where: str = ""
    on_fail: OnFail = "dead_letter"
    tries: int = limits.RECORD_FAILURES_MAX

    @property
    def in_tasks(self) -> bool:
        """Whether it reads topics."""
        return isinstance(self.channel, TopicT)

    async def on_start(self) -> None:
        """Instances are made by the tasks."""
        if not self.in_tasks:
            await super().on_start()

    async def on_stop(self) -> None:
        """Instances end with their tasks."""
        if not self.in_tasks:
            await super().on_stop()

    def cancel(self) -> None:
        """Likewise."""
        if not self.in_tasks:
            super().cancel()

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
        return AgentSpec(self.name, tuple(self.get_topic_names()), self._run, self.where, self.on_fail, self.tries)

    async def _run(self, stream: TaskStream) -> None:
        result = self.fun(stream)  # type: ignore[arg-type]
        if isinstance(result, AsyncIterable):
            async for value in result:
                await self._delegate_to_sinks(value)
        else:
            self._require_no_sinks()
            await result

    def _require_no_sinks(self) -> None:
        if self._sinks:
            raise UserError(
                f"Agent {self.name} has sinks and yields nothing to them.",
                remedy="`yield` what the sinks are to get, or leave `sink=` out.",
                where=self.where,
            )

    async def ask_nowait(self, *args: Any, **kwargs: Any) -> Any:
        """All of Faust's calls that wait for a reply (`ask`, `map`, `join`, …) come through here."""
        raise UserError(
            f"Agent {self.name} is asked for a reply, which agents of streamproc do not give yet.",
            remedy="Use `cast` or `send`, and let the agent write its answer to a topic or a table.",
            where=self.where,
        )
