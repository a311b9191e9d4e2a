"""The worker's heart inside Faust: which tasks it holds, what they are fed, and what happens when one cannot go on."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from faust.types import TP
from mode import Service

from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import BrokerUnavailable, InvariantBroken, LogLost, UserError, WorkerFailure
from streamproc.core.memory import release_free_memory
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.monitor import SensorFeed
from streamproc.runtime.ownerwork import OwnerWork
from streamproc.runtime.sourcework import SourceWork
from streamproc.runtime.standby import Standby, StandbyEnvironment, Standbys
from streamproc.runtime.start import require_same_code, task_folder
from streamproc.runtime.task import Task, TaskEnvironment
from streamproc.runtime.topology import Group, internal_topics, with_shared_topics
from streamproc.runtime.warm import warm_up
from streamproc.state.contract import Store
from streamproc.state.objects import ObjectOverlay
from streamproc.transport.contract import Fetcher, GroupListener, Membership, TopicSpec, Transport

__all__ = ["Host", "Runtime"]

logger = logging.getLogger(__name__)


class Host(Protocol):
    """What the runtime asks of the app around it, beside what any `faust.App` offers."""

    commit_interval_s: float
    consumer_generation_id: int
    conf: Any
    consumer: Any
    in_worker: bool
    """This process is a worker's own: nothing else lives in it."""
    on_rebalance_complete: Any
    rebalancing: bool

    @property
    def state_folder(self) -> Path: ...

    def make_transport(self) -> Transport: ...

    def open_store(self, folder: Path) -> Store: ...

    def declared_topics(self) -> list[TopicSpec]: ...

    def read_topics(self) -> set[str]: ...

    def own_partitions(self, topic: str, known: Mapping[str, int]) -> int | None: ...

    def build_groups(self, partitions: Mapping[str, int]) -> list[Group]: ...

    @property
    def tables(self) -> Any: ...

    @property
    def flow_control(self) -> Any: ...

    def on_rebalance_start(self) -> None: ...

    def on_rebalance_return(self) -> None: ...

    def on_rebalance_end(self) -> None: ...

    async def crash(self, reason: BaseException) -> None: ...


class Runtime(Service):
    """Tasks, pumps and timers of one worker."""

    def __init__(self, app: Host, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self.app, self.clock = app, clock
        self.ready = asyncio.Event()
        self.groups: dict[str, Group] = {}
        self.tasks: dict[TaskId, Task] = {}
        self.standbys = Standbys(lambda failure: self._spawn(self.app.crash(failure)))
        self.generation = -1
        self._transport: Transport | None = None
        self._membership: Membership | None = None
        self._fetchers: dict[str, Fetcher] = {}
        self._partitions: dict[str, int] = {}
        self._without_key: dict[str, int] = {}
        self._runs: dict[TaskId, asyncio.Task[None]] = {}
        self._background: dict[asyncio.Task[Any], None] = {}
        self._sensors = SensorFeed(app)
        self._warm: asyncio.Future[None] | None = None
        self._busy: Task | None = None
        self._leisure_wanted = False
        self._told: dict[TopicPartition, Offset] = {}

    # ---- the transport, shared with Faust's producer

    @property
    def transport(self) -> Transport:
        if self._transport is None:
            raise UserError("The app has not been started.", remedy="Run it with `faust -A MODULE worker`.")
        return self._transport

    async def open_transport(self) -> None:
        if self._transport is None:
            transport = self.app.make_transport()
            await transport.start()
            self._transport = transport

    def warm_up(self, *, pipelines: bool) -> None:
        """Begin to load the compiled kernels, beside everything else that a start does."""
        self._warm = asyncio.get_running_loop().run_in_executor(None, partial(warm_up, pipelines=pipelines))

    async def _warmed_up(self) -> None:
        """Nothing is read before. Compiling must not hold up the heartbeats of a group: it is not joined before either."""
        if self._warm is None:
            return
        _, late = await asyncio.wait({self._warm}, timeout=limits.WARM_UP_QUIET_S)
        if late:
            logger.warning("compiling for this machine, which is done once and may take a minute")
        await self._warm

    async def close_transport(self) -> None:
        if self._transport is not None:
            await self._transport.stop()
            self._transport = None

    async def partition_count(self, topic: str) -> int:
        if topic not in self._partitions:
            declared = (spec for spec in self.app.declared_topics() if spec.name == topic)
            await self._require_topic(next(declared, TopicSpec(topic, 0)))
        return self._partitions[topic]

    def knows(self, topic: str) -> bool:
        """Whether the topic's partitions have been asked for already."""
        return topic in self._partitions

    def known_partitions(self, topic: str) -> int:
        return self._partitions.get(topic) or int(self.app.conf.topic_partitions)

    def next_partition(self, topic: str) -> int:
        """Round robin, for records without a key."""
        self._without_key[topic] = number = self._without_key.get(topic, -1) + 1
        return number

    # ---- membership

    async def subscribe(self, topics: set[str]) -> None:
        """Faust's conductor has gathered its own topics; ours are added and the group is joined."""
        if self._membership is not None:
            return
        try:
            await self._prepare()
            await self._warmed_up()
            self._sensors.warn()
            ours = {topic for group in self.groups.values() for topic in group.plan.sources}
            self._membership = self.transport.membership(self.app.conf.id)
            listener = GroupListener(self._on_revoked, self._on_assigned)
            await self._membership.start(ours | topics, listener)
            self._spawn(self._watch_membership(self._membership))
        except (WorkerFailure, BrokerUnavailable) as failure:
            await self.app.crash(failure)

    async def _prepare(self) -> None:
        """Check every topic and plan, make the internal topics, before the group is joined."""
        declared, read = self.app.declared_topics(), self.app.read_topics()
        for spec in declared:
            if spec.partitions or spec.name in read:
                await self._require_topic(spec)
        groups = with_shared_topics(self.app.build_groups(self._partitions))
        for group in groups:
            await self._require_same_program(group)
        await self.transport.create_topics(internal_topics(groups))
        for spec in declared:
            if not self.knows(spec.name):  # perhaps a side output, which the groups have just made
                await self._require_topic(spec)
        self.groups = {group.plan.name: group for group in groups}
        for name in self.groups:
            self._fetchers[name] = fetcher = self.transport.fetcher()
            self._spawn(self._pump(name, fetcher))

    async def _require_same_program(self, group: Group) -> None:
        """Sources must not have grown since the application first started, when the commits topic was made, and the log
        must be of this code. Each task checks it again; here it is found before the group is joined, so that a wrong
        deployment, started over and over, takes no partition from the workers that run."""
        plan = group.plan
        had = await self.transport.partitions(plan.commits_topic)
        if had is None:
            return
        if had != plan.partitions:
            raise UserError(
                f"Topic {' and '.join(plan.sources)} had {had} partitions when {plan.app_id} first started and has "
                f"{plan.partitions} now ({plan.commits_topic} has {had}).",
                remedy="Keys have moved, so the state no longer fits: start under a new id, or `streamproc reset MODULE`.",
            )
        try:
            await require_same_code(self.transport, plan)
        except BrokerUnavailable as outage:
            logger.info(
                "group %s is joined without knowing whether its log fits; its tasks will see: %s", plan.name, outage
            )

    async def _require_topic(self, spec: TopicSpec) -> None:
        if spec.partitions:
            await self.transport.create_topics([spec])
        count = await self.transport.partitions(spec.name)
        if count is None and (own := self.app.own_partitions(spec.name, self._partitions)):
            await self.transport.create_topics([replace(spec, partitions=own)])
            count = own
        if count is None:
            raise UserError(f"Topic {spec.name} does not exist.", remedy=_how_to_create(spec.name))
        self._partitions[spec.name] = count

    async def _watch_membership(self, membership: Membership) -> None:
        await self.app.crash(await membership.failed())

    def assignment(self) -> frozenset[TopicPartition]:
        return self._membership.assignment() if self._membership is not None else frozenset()

    def _member(self) -> Membership:
        assert self._membership is not None
        return self._membership

    async def _on_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Ours first: barrier, commit, close. Then Faust's signals."""
        self.app.on_rebalance_start()
        await self.close_tasks()
        await self.app.consumer.call_revoked({TP(*tp) for tp in revoked})

    async def _on_assigned(self, assigned: Collection[TopicPartition], generation: int) -> None:
        """Faust's first. Tasks start in the background: a restore may take longer than a rebalance may."""
        if not self.app.rebalancing:
            self.app.on_rebalance_start()  # the first assignment follows no revocation
        self.generation = generation
        self.app.consumer_generation_id = generation
        await self.close_tasks()
        await self.app.consumer.call_assigned({TP(*tp) for tp in assigned}, generation)
        self.app.on_rebalance_return()
        await self._start_standbys(assigned)
        self._start_tasks(assigned)
        self._spawn(self._announce(list(self.tasks.values())))

    async def _start_standbys(self, assigned: Collection[TopicPartition]) -> None:
        """Before the tasks: one that was a standby here until now finds its store closed, and warm."""
        warm = self._member().standbys() - set(assigned) if self.app.conf.table_standby_replicas else frozenset()
        wanted = {
            TaskId(name, partition): group.plan
            for name, group in self.groups.items()
            for partition in range(group.plan.partitions)
            if group.plan.tables and warm.issuperset(TopicPartition(topic, partition) for topic in group.plan.sources)
        }
        await self.standbys.keep(wanted)
        for task, plan in wanted.items():
            self.standbys.start(Standby(task, plan, self._standby_env))

    @cached_property
    def _standby_env(self) -> StandbyEnvironment:
        return StandbyEnvironment(
            self.transport, self.clock, self.app.open_store, partial(task_folder, self.app.state_folder),
            asyncio.Semaphore(limits.STANDBY_READS_MAX),
        )  # fmt: skip

    def _start_tasks(self, assigned: Collection[TopicPartition]) -> None:
        held = set(assigned)
        self._told.clear()
        for name, group in self.groups.items():
            env = TaskEnvironment(
                group.plan, self.transport, self._member, self._fetchers[name], self.clock, self.app.open_store,
                self.app.state_folder, group.make_work, self.app.conf.id, self._sensors, self._at_leisure,
                self._epoch_s, self._told, self._caught_up,
            )  # fmt: skip
            for partition in range(group.plan.partitions):
                sources = {TopicPartition(topic, partition) for topic in group.plan.sources}
                if sources <= held:
                    task_id = TaskId(name, partition)
                    self.tasks[task_id] = task = Task(task_id, env)
                    self._runs[task_id] = asyncio.create_task(task.run(), name=f"task {task_id}")
                    self._runs[task_id].add_done_callback(partial(self._ended, task))
                elif sources & held:
                    logger.error(
                        "task %s:%d is not started: not all of %s are on this worker", name, partition, sources
                    )

    async def _announce(self, tasks: Collection[Task]) -> None:
        """What Faust's recovery would have said."""
        for task in tasks:
            await task.restored.wait()
        if not self.ready.is_set():
            if self.app.in_worker:
                # What start-up made (modules, compiled code, plans) stays for good: looking through it at every full
                # collection took a tenth of a second each, a quarter of a per-record agent's time.
                gc.freeze()
            await self.app.on_rebalance_complete.send()
            self.app.flow_control.resume()
            self.app.tables.on_actives_ready()
            self.app.tables.on_standbys_ready()
        self.app.on_rebalance_end()
        self.ready.set()

    def _ended(self, task: Task, run: asyncio.Task[None]) -> None:
        failure: BaseException | None
        if not run.cancelled():
            failure = run.exception()
        else:
            # Nobody but `close_tasks` cancels a task; a cancellation from within would leave its partition unread.
            failure = None if task.closing else InvariantBroken(f"Task {task.id} was cancelled from within.")
        if failure is not None:
            self._spawn(self.app.crash(failure))

    async def close_tasks(self) -> None:
        """Barrier, commit and close all of them within the budget; what does not fit is aborted and redone elsewhere."""
        closing, runs = dict(self.tasks), dict(self._runs)
        for task_id, task in closing.items():
            if not task.close():
                runs[task_id].cancel()
        if runs:
            _, late = await asyncio.wait(runs.values(), timeout=limits.REVOKE_S)
            for run in late:
                run.cancel()
            if late:
                logger.warning("%d tasks did not close in time; their open epochs are redone", len(late))
                await asyncio.wait(late)
        for task_id, task in closing.items():
            if self.tasks.get(task_id) is task:  # and no newer one, started by a rebalance meanwhile
                del self.tasks[task_id], self._runs[task_id]

    # ---- feeding and timing

    async def _pump(self, name: str, fetcher: Fetcher) -> None:
        while True:
            try:
                batch = await fetcher.get()
            except BrokerUnavailable as outage:
                logger.warning("group %s cannot fetch: %s", name, outage)
                await self.clock.sleep(limits.RETRY_BACKOFF_S_MAX)
                continue
            except WorkerFailure as failure:
                if isinstance(failure, LogLost) and await self._moved_away():
                    await self.clock.sleep(limits.RETRY_BACKOFF_S_MAX)
                    continue
                await self.app.crash(failure)
                return
            self._sensors.fetched(batch)
            task = self.tasks.get(TaskId(name, batch.tp.partition))
            if task is not None:
                task.offer(batch)
            await asyncio.sleep(0)

    async def _moved_away(self) -> bool:
        """Whether others may own our partitions: who stood still for longer than its session finds its positions trimmed by
        the next owner, and has lost nothing."""
        try:
            return not await self._member().confirm()
        except BrokerUnavailable:
            return True  # it will be asked again

    @Service.task
    async def _commit_timer(self) -> None:
        while not self.should_stop:
            await self.clock.sleep(self.app.commit_interval_s)
            self.commit_now()

    @Service.task
    async def _idle_timer(self) -> None:
        released_s = self.clock.monotonic_s()
        while not self.should_stop:
            began_s = self.clock.monotonic_s()
            await self.clock.sleep(limits.TICK_S)
            self._say_if_stood_still(self.clock.monotonic_s() - began_s - limits.TICK_S)
            now_ms = round(self.clock.monotonic_s() * 1000)
            for task in list(self.tasks.values()):
                task.tick(now_ms)
            if self.app.in_worker and began_s - released_s >= limits.FREE_MEMORY_INTERVAL_S:
                release_free_memory()
                released_s = began_s

    def _say_if_stood_still(self, stood_s: float) -> None:
        """No heartbeat was sent meanwhile: what follows in the log, a lost membership and fenced tasks, is only its result."""
        session_s = float(self.app.conf.broker_session_timeout)
        if stood_s > session_s / 2:
            logger.warning(
                "nothing ran in this worker for %.1f s%s: an agent called something that blocks the event loop, or the "
                "process was stopped. Await such a call, or hand it to asyncio.to_thread.",
                stood_s, f", its session time-out is {session_s:g} s, so its tasks have moved" if stood_s > session_s else "",
            )  # fmt: skip

    @Service.task
    async def _trim_timer(self) -> None:
        """Repartition topics are read once; what is committed behind them may go."""
        while not self.should_stop:
            await self.clock.sleep(limits.TRIM_INTERVAL_S)
            before: dict[TopicPartition, Offset] = {}
            for task in self.tasks.values():
                if isinstance(task.work, OwnerWork) and task.record is not None:
                    at = task.committed_position(task.work.tp)
                    if at:
                        before[task.work.tp] = at
            try:
                if before:
                    await self.transport.delete_records(before)
            except BrokerUnavailable as outage:
                logger.warning("repartition topics were not trimmed: %s", outage)

    def _at_leisure(self) -> bool:
        """Asked at every commit: one task that is not is looked at before all the others."""
        if self._busy is None or self._busy.at_leisure:
            self._busy = next((task for task in self.tasks.values() if not task.at_leisure), None)
        if self._busy is not None:
            self._leisure_wanted = True
            return False
        if self._leisure_wanted:
            self._leisure_wanted = False
            for task in self.tasks.values():
                task.look_again()
        return True

    def _epoch_s(self) -> float:
        """See `TaskEnvironment`; 0 while the tasks are few."""
        return max(0, len(self.tasks) - limits.PACED_TASKS_MIN) * limits.PACE_S_PER_TASK

    def _caught_up(self) -> None:
        """Those that asked for leisure in vain may have it now: no need to wait for the next tick."""
        if self._leisure_wanted:
            self._at_leisure()

    def commit_now(self) -> None:
        for task in list(self.tasks.values()):
            task.commit_due()

    # ---- asked from outside

    def committed(self, table: str, key: Any, default: Any = None) -> Any:
        """The committed value of an `app.Table` key held by a task of this worker."""
        for task in self.tasks.values():
            if task.store is not None and task.overlay(table) is not None:
                found = ObjectOverlay(task.store, table).get(key)
                if found is not None:
                    return found
        return default

    def finished(self) -> bool:
        """Every bounded input is at its end, every window final, everything committed and in its sinks."""
        tasks = list(self.tasks.values())
        return bool(tasks) and all(task.finished() for task in tasks)

    def counts(self) -> dict[str, int]:
        """Records taken in and committed, by pipeline."""
        found: dict[str, int] = {}
        for task in self.tasks.values():
            if isinstance(task.work, SourceWork):
                name = task.work.plan.name
                found[name] = found.get(name, 0) + task.work.counters.records
        return found

    async def crash(self, reason: BaseException) -> None:
        """What a timer of ours fails with ends the worker as a task's failure does."""
        await self.app.crash(reason)

    async def on_stop(self) -> None:
        if self._membership is not None:
            await self._membership.stop()
        await self.standbys.keep(())
        await self.close_tasks()
        for running in list(self._background):
            running.cancel()
        for fetcher in self._fetchers.values():
            await fetcher.close()

    def _spawn(self, coroutine: Any) -> None:
        running = asyncio.ensure_future(coroutine)
        self._background[running] = None
        running.add_done_callback(self._background_ended)

    def _background_ended(self, running: asyncio.Task[Any]) -> None:
        """A pump that dies unheard would leave its partitions unread for ever."""
        self._background.pop(running, None)
        if not running.cancelled() and (failure := running.exception()) is not None and not self.should_stop:
            crash = asyncio.ensure_future(self.app.crash(failure))
            self._background[crash] = None
            crash.add_done_callback(lambda ended: self._background.pop(ended, None))


def _how_to_create(topic: str) -> str:
    return (
        f'Give it partitions in the code, app.topic("{topic}", partitions=4, …), or create it: '
        f"kafka-topics.sh --create --topic {topic} --partitions 4."
    )
