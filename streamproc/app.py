"""`App`: a `faust.App` whose records, tables and commits are streamproc's. Configuration and wiring, nothing else."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import tzinfo
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar, get_args, overload
from urllib.parse import urlsplit

import faust
from faust.app.base import BootStrategy as FaustBootStrategy
from faust.web import View
from yarl import URL

from streamproc.avro.columns import dtype_of
from streamproc.avro.encode import Encoder
from streamproc.avro.registry import DirectoryRegistry, Registry
from streamproc.avro.rows import RowDecoder
from streamproc.avro.schema import Schema, load_schema
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.durations import Duration, milliseconds
from streamproc.core.errors import InvariantBroken, StreamprocError, UserError
from streamproc.eventtime.spec import EventTime
from streamproc.operators.pipeline import Declaration, Pipeline, caller, compile
from streamproc.runtime.agentwork import OnFail, RowReader
from streamproc.runtime.assignor import Assignor
from streamproc.runtime.glue import FaustTransport
from streamproc.runtime.runtime import Runtime
from streamproc.runtime.surface import Agent, Table, TableManager, Topic
from streamproc.runtime.topology import AgentTable, Group, agent_group, pipeline_groups
from streamproc.state.contract import Store
from streamproc.state.memory import MemoryStore
from streamproc.state.rocksdb import open_or_discard
from streamproc.transport.contract import TopicSpec, Transport
from streamproc.transport.embedded import EmbeddedTransport
from streamproc.web import install

__all__ = ["App", "Worker"]

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
_other_excepthook = sys.excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `UserError` while the user's module is imported, also by ``faust -A``, is told as one at start is: by its message,
    which names the line. Everything else is for the hook that was there before."""
    if isinstance(error, UserError):
        sys.stderr.write(f"\nstreamproc stops: {error}\n")
    else:
        _other_excepthook(kind, error, trace)


sys.excepthook = _excepthook


class Worker(faust.Worker):
    """Faust's worker that ends with a message, not a traceback, when it stops for a reason we can name."""

    def __init__(self, app: faust.App, *services: Any, **options: Any) -> None:
        # Faust's command line asks for it always, whatever the setting says.
        options["redirect_stdouts"] = app.conf.worker_redirect_stdouts
        super().__init__(app, *services, **options)
        if self.spinner is not None and not self.spinner.file.isatty():
            self.spinner = None  # it would write escape codes between the lines of a log

    async def start(self) -> None:
        try:
            await super().start()
        except StreamprocError as reason:
            if not isinstance(self.app, App):
                raise
            await self.app.crash(reason)

    def execute_from_commandline(self) -> NoReturn:
        app = self.app
        try:
            super().execute_from_commandline()
        except SystemExit:
            if isinstance(app, App) and app.failure is not None:
                # Said when it happened, above all that a stopping worker says; here it is the last word.
                sys.stderr.write(f"\nstreamproc stops: {app.failure}\n")
                raise SystemExit(1) from None
            raise


class BootStrategy(FaustBootStrategy):
    """Faust's services, then our runtime, which stops first."""

    def tables(self) -> Any:
        return [*super().tables(), self.app.runtime]  # type: ignore[attr-defined]


class App(faust.App):
    """A stream application.

    ``broker``: ``kafka://HOST:PORT`` (several with ``;``) or ``embedded://PATH``, a log in a local file and no server.
    ``schemas``: folder of ``.avsc`` files with their ``ids.json``; read when the first schema is asked for.
    ``commit_interval``: time between two commits of a task, so also the least delay of a result.
    ``store``: ``rocksdb://`` or ``memory://``; either is restored from the changelog.
    ``agent_on_fail``, ``agent_tries``: what `agent` takes for ``on_fail`` and ``tries`` where it is not told.
    ``clock``: processing time, for tests. Everything else is a setting of Faust.
    """

    BootStrategy = BootStrategy

    def __init__(
        self,
        id: str,
        *,
        broker: str = "embedded://data",
        schemas: str | Path = "schemas",
        commit_interval: Duration = "1s",
        store: str = "rocksdb://",
        clock: Clock | None = None,
        agent_on_fail: OnFail = "dead_letter",
        agent_tries: int = limits.RECORD_FAILURES_MAX,
        **options: Any,
    ) -> None:
        _check_failing("agent_on_fail", agent_on_fail, "agent_tries", agent_tries)
        self.agent_on_fail: OnFail = agent_on_fail
        self.agent_tries = agent_tries
        self.clock: Clock = clock or SystemClock()
        self.declaration = Declaration()
        self.failure: StreamprocError | None = None
        self.commit_interval_s = milliseconds(commit_interval, setting="commit_interval") / 1000
        self._schemas_folder = Path(schemas)
        self._broker = _checked_url(broker)
        self._declared: dict[str, Topic] = {}
        self._web_token: str | None = options.pop("web_token", None)
        options.pop("processing_guarantee", None)  # always exactly once; Faust's own machinery for it must stay off
        bind = options.setdefault("web_bind", "127.0.0.1")
        if bind in ("127.0.0.1", "localhost", "::1"):
            options.setdefault("web_host", "127.0.0.1")
        options.setdefault("broker_session_timeout", 10.0)
        options.setdefault("broker_heartbeat_interval", 2.0)
        options.setdefault("worker_redirect_stdouts", False)
        options.setdefault("table_standby_replicas", 0)
        classes = {"Agent": Agent, "Table": Table, "TableManager": TableManager, "Topic": Topic, "Worker": Worker,
                   "PartitionAssignor": Assignor}  # fmt: skip
        super().__init__(id, broker=broker, store=store, **{**classes, **options})

    # ---- what users declare

    def topic(self, *topics: str, value_schema: str | Path | None = None, event_time: EventTime | None = None,
              **options: Any) -> Topic:  # fmt: skip
        """Faust's topic, with an Avro schema (an ``.avsc`` file) and an event time, both shared by all who read it.

        With ``partitions`` the topic is created if it is missing, with ``retention``, ``compacting``, ``deleting`` and
        ``config`` as Faust has them; a topic that is there and differs is an error. A name that was declared before is
        the same topic: a second declaration without a schema or serializer of its own has the first one's.
        """
        topic = super().topic(*topics, **options)
        assert isinstance(topic, Topic)
        topic.where = caller()
        topic.event_time = event_time
        topic.declared_partitions = options.get("partitions")
        if value_schema is not None:
            schema = self._load(value_schema, topic.where)
            topic.value_schema = schema
            topic.encoder = _LazyEncoder(self, schema)
        if len(topics) == 1:
            self._declare(topics[0], topic, options)
        return topic

    def _declare(self, name: str, topic: Topic, options: Mapping[str, Any]) -> None:
        known = self._declared.get(name)
        if known is not None and topic.encoder is None and not _OF_VALUES.intersection(options):
            topic.value_schema, topic.encoder = known.value_schema, known.encoder
            topic.event_time = topic.event_time or known.event_time
            topic.declared_partitions = topic.declared_partitions or known.declared_partitions
            if topic.spec() == known.spec() or not options:
                return
        self._declared[name] = topic

    def pipeline(self, topic: Any, *, name: str | None = None) -> Pipeline:
        """Begin a pipeline over ``topic``; ``name`` (default: the topic's) is its identity in the commit record."""
        if not isinstance(topic, Topic) or topic.value_schema is None:
            raise UserError(
                f"app.pipeline({topic!r}) has no schema to find columns in.",
                remedy='Declare the topic with one: app.topic("orders", value_schema="schemas/order.avsc", …).',
                where=caller(),
            )
        title = topic.get_topic_name()
        schema = topic.value_schema
        columns = {field.name: dtype_of(schema, field.name) for field in schema.root.fields}
        return self.declaration.pipeline(
            name or title, topic=title, columns=columns, event_time=topic.event_time, schema=schema
        )

    def agent(self, channel: Any = None, *, on_fail: OnFail | None = None, tries: int | None = None,
              **options: Any) -> Callable[[Callable[[Any], Any]], Agent]:  # fmt: skip
        """Faust's decorator; the agent runs once in each task, inside its transaction.

        A record that raises in it is undone and given to it again, alone, until it has failed ``tries`` times (default:
        the app's ``agent_tries``). Then ``on_fail`` (default: the app's ``agent_on_fail``): ``"dead_letter"`` sets it aside
        and goes on, ``"stop"`` ends the worker in front of it, with the line that raised.
        """
        policy = self.agent_on_fail if on_fail is None else on_fail
        limit = self.agent_tries if tries is None else tries
        _check_failing("on_fail", policy, "tries", limit)
        where, declare = caller(), super().agent(channel, **options)

        def decorate(fun: Callable[[Any], Any]) -> Agent:
            agent = declare(fun)
            assert isinstance(agent, Agent)
            agent.where, agent.on_fail, agent.tries = where, policy, limit
            return agent

        return decorate

    def Table(self, name: str, **options: Any) -> Table:
        """Faust's table, in the task's transaction and on its store."""
        where = caller()
        table = super().Table(name, **options)
        assert isinstance(table, Table)
        table.where = where
        return table

    def GlobalTable(self, name: str, **options: Any) -> NoReturn:
        raise _not_yet("app.GlobalTable", "Use app.Table, or a topic that each worker reads whole.")

    def SetTable(self, name: str, **options: Any) -> NoReturn:
        raise _not_yet("app.SetTable", "Use app.Table(…, default=set) and assign: table[key] = table[key] | {…}.")

    def SetGlobalTable(self, name: str, **options: Any) -> NoReturn:
        raise _not_yet("app.SetGlobalTable", "Use app.Table.")

    # ---- Faust's decorators, unchanged but for their types

    @overload  # type: ignore[override]  # as in Faust: an app's decorator, not mode's
    def task(self, fun: F) -> F: ...
    @overload
    def task(self, fun: None = None, *, on_leader: bool = False, traced: bool = True) -> Callable[[F], F]: ...
    def task(self, fun: Any = None, *, on_leader: bool = False, traced: bool = True) -> Any:
        return super().task(fun, on_leader=on_leader, traced=traced)

    def timer(  # type: ignore[override]  # likewise
        self,
        interval: Any,
        on_leader: bool = False,
        traced: bool = True,
        name: str | None = None,
        max_drift_correction: float = 0.1,
    ) -> Callable[[F], F]:
        decorate: Callable[[F], F] = super().timer(interval, on_leader, traced, name, max_drift_correction)
        return decorate

    def crontab(  # type: ignore[override]  # likewise
        self, cron_format: str, *, timezone: tzinfo | None = None, on_leader: bool = False, traced: bool = True
    ) -> Callable[[F], F]:
        return super().crontab(cron_format, timezone=timezone, on_leader=on_leader, traced=traced)

    def page(self, path: str, **options: Any) -> Callable[[Callable[..., Any]], type[View]]:
        return super().page(path, **options)

    @property
    def in_transaction(self) -> bool:
        """Whether Faust's own transactions run: never, also if the environment asks for them."""
        return False

    async def on_start(self) -> None:
        """Before any service."""
        await super().on_start()
        self.runtime.warm_up(pipelines=bool(self.declaration.sources))

    # ---- what the runtime asks

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime(self, self.clock, beacon=self.beacon)

    @cached_property
    def registry(self) -> Registry:
        """Which schema an id means. A registry behind a URL will be another `Registry`."""
        return DirectoryRegistry(self._schemas_folder)

    @property
    def state_folder(self) -> Path:
        return Path(self.conf.tabledir) / "tasks"

    def _new_transport(self) -> Any:
        return FaustTransport(self.conf.broker_consumer, self)

    def _new_producer_transport(self) -> Any:
        return FaustTransport(self.conf.broker_producer, self)

    def make_transport(self) -> Transport:
        """The log the broker URL names."""
        urls = [str(url) for url in self.conf.broker]
        schemes = {urlsplit(url).scheme for url in urls}
        if schemes == {"embedded"}:
            return EmbeddedTransport(Path(self._embedded_path(urls[0])), self.clock)
        if schemes == {"kafka"}:
            from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

            from streamproc.transport.kafka import KafkaTransport

            servers = [f"{url.host}:{url.port or 9092}" for url in self.conf.broker]
            return KafkaTransport(
                servers, self.clock, client_id=self.conf.broker_client_id, assignor=self.assignor,
                instance_id=self.conf.consumer_group_instance_id,
                session_timeout_s=self.conf.broker_session_timeout,
                heartbeat_interval_s=self.conf.broker_heartbeat_interval,
                security=credentials_to_aiokafka_auth(self.conf.broker_credentials, self.conf.ssl_context),
            )  # fmt: skip
        shown = ";".join(str(url.with_user(None)) if url.host else str(url) for url in self.conf.broker)
        raise UserError(f"broker={shown!r} is not a log streamproc knows.", remedy=_BROKER_REMEDY)

    def _embedded_path(self, url: str) -> str:
        """The path as the user wrote it: a URL parser takes its first folder for a host and drops empty ones."""
        if str(URL(self._broker)) == url:
            return self._broker.removeprefix("embedded://")
        return url.removeprefix("embedded:").removeprefix("//")  # out of the environment, by Faust

    def open_store(self, folder: Path) -> Store:
        """The local store of one task."""
        if self.conf.store.scheme == "memory":
            return MemoryStore()
        return open_or_discard(folder)

    def declared_topics(self) -> list[TopicSpec]:
        """Source and output topics as declared, those of agents that name none last; partitions 0 where the declaration
        leaves the number open. What Faust declares for itself is not among them."""
        own = {name for agent in self._task_agents() for name in agent.get_topic_names()}
        topics = [topic for name, topic in self._declared.items() if not topic.internal or name in own]
        return [topic.spec() for topic in sorted(topics, key=lambda topic: topic.internal)]

    def read_topics(self) -> set[str]:
        """What must exist before any task can be planned."""
        agents = {name for agent in self._task_agents() for name in agent.get_topic_names()}
        return agents | {source.topic for source in self.declaration.sources}

    def own_partitions(self, topic: str, known: Mapping[str, int]) -> int | None:
        """How many partitions an agent's own topic is made with: as many as the other agents' topics have, else Faust's
        ``topic_partitions``. None: the topic is not an agent's own."""
        if topic not in self._declared or not self._declared[topic].internal:
            return None
        others = {known[name] for agent in self._task_agents() for name in agent.get_topic_names() if name in known}
        return others.pop() if len(others) == 1 else int(self.conf.topic_partitions)

    def _task_agents(self) -> list[Agent]:
        return [agent for agent in self.agents.values() if isinstance(agent, Agent) and agent.in_tasks]

    def build_groups(self, partitions: Mapping[str, int]) -> list[Group]:
        """Check and compile all that was declared."""
        plans = compile(self.declaration, partitions, self.conf.id)
        groups = pipeline_groups(plans, self.declaration, self.registry, self.conf.id, partitions) if plans else []
        specs = [agent.spec() for agent in self._task_agents()]
        if specs:
            tables = [AgentTable(table.name, table.default) for table in self.tables.values()]
            readers = {topic: self._reader(topic) for spec in specs for topic in spec.topics}
            groups.append(agent_group(specs, tables, readers, self.conf.id, partitions, self.clock))
        return groups

    def _reader(self, name: str) -> RowReader:
        topic = self._declared.get(name)
        if topic is not None and topic.value_schema is not None:
            return RowDecoder(topic.value_schema, self.registry)
        return _FaustReader(self, topic)

    def _load(self, path: str | Path, where: str) -> Schema:
        """A path as given, else the same file name in the schema folder."""
        given = Path(path)
        try:
            return load_schema(given if given.exists() else self._schemas_folder / given.name)
        except UserError as wrong:
            raise UserError(wrong.fact, remedy=wrong.remedy, where=where) from wrong

    def on_webserver_init(self, web: Any) -> None:
        """The web view, beside Faust's own pages; `UserError` if it would be open to the network without a token."""
        install(self, web, self._web_token)

    # ---- what ends the worker

    async def crash(self, reason: BaseException) -> None:
        """A reason we can name ends the worker with its message and exit code 1; anything else is Faust's crash."""
        if not isinstance(reason, StreamprocError) or not self.in_worker:
            await super().crash(reason)
            return
        if self.failure is None:
            self.failure = reason
            bug = isinstance(reason, InvariantBroken)  # for which the report needs the trace
            logger.critical("streamproc stops: %s", reason, exc_info=reason if bug else None)
            signal.raise_signal(signal.SIGTERM)


_BROKER_REMEDY = "Write kafka://HOST:PORT or embedded://PATH."


def _checked_url(broker: str) -> str:
    """``broker`` unless a part of it cannot be parsed. A URL may hold a password, so it is not shown."""
    try:
        for part in broker.split(";"):
            URL(part)
    except ValueError as error:
        raise UserError(f"The broker's URL is none: {error}.", remedy=_BROKER_REMEDY, where=caller()) from error
    return broker


def _check_failing(policy_name: str, policy: Any, tries_name: str, tries: Any) -> None:
    """What becomes of a failing record is decided before the first one."""
    if policy not in get_args(OnFail):
        raise UserError(
            f"{policy_name}={policy!r} is not known.",
            remedy=f'Write {policy_name}="dead_letter" or {policy_name}="stop".',
            where=caller(),
        )
    if type(tries) is not int or tries < 1:
        raise UserError(
            f"{tries_name}={tries!r} is not a number of tries.",
            remedy=f"Write a whole number from 1 on, such as {tries_name}={limits.RECORD_FAILURES_MAX}.",
            where=caller(),
        )


_OF_VALUES = frozenset({"schema", "key_type", "value_type", "key_serializer", "value_serializer"})
"""Options of a declaration that say how its values are read."""


def _not_yet(what: str, remedy: str) -> UserError:
    return UserError(f"{what} is not there yet.", remedy=remedy, where=caller())


class _LazyEncoder:
    """Made at the first send: an app that only reads needs no id for its schema."""

    def __init__(self, app: App, schema: Schema) -> None:
        self._app, self._schema = app, schema

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._schema, self._app.registry.id_of(self._schema))

    def encode(self, value: Any) -> bytes:
        return self._encoder.encode(value)


class _FaustReader:
    """Values by Faust's serializers, for topics without an Avro schema."""

    def __init__(self, app: App, topic: Topic | None) -> None:
        self._app, self._topic = app, topic

    def rows(self, batch: RawBatch) -> tuple[list[Any], list[Any]]:
        kind = self._topic.value_type if self._topic is not None else None
        serializer = self._topic.value_serializer if self._topic is not None else None
        loads = self._app.serializers.loads_value
        good: list[Any] = []
        bad: list[Any] = []
        for row in range(len(batch)):
            try:
                good.append(loads(kind, batch.value(row), serializer=serializer))
            except faust.exceptions.ValueDecodeError as broken:
                bad.append(_Bad(row, f"value is not {serializer or 'json'}: {type(broken.__cause__).__name__}"))
        return good, bad


class _Bad:
    schema_id: int | None = None

    def __init__(self, row: int, reason: str) -> None:
        self.row, self.reason = row, reason
