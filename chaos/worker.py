"""The job as a worker that tells how far it is, and that kills or stops itself when told to, at a moment when it holds
work that is not committed.

    CHAOS_FOLDER=… CHAOS_NAME=a faust -A chaos.worker worker

A line on its standard input says what and when: ``kill after EndTxn``, ``stop within an epoch`` (see `chaos.MOMENTS`).
``NAME.json`` says what it holds; ``NAME.ends`` gets a line each time: the moment, and for each source partition what was
committed and what had been read.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final

from chaos import MOMENTS
from chaos.job import app
from streamproc.commit.record import tp_name
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.task import Phase, Task
from streamproc.sinks.postgres_writer import PostgresWriter
from streamproc.sinks.redis_writer import RedisWriter
from streamproc.transport.contract import OutRecord, TaskProducer

__all__ = ["app"]

TELL_S: Final = 0.2
LOOK_S: Final = 0.002
"""How often a worker that is to end within an epoch looks whether it holds one."""
FOLDER, NAME = Path(os.environ["CHAOS_FOLDER"]), os.environ["CHAOS_NAME"]

app.conf.datadir = FOLDER / f"state-{NAME}"


class Armed:
    """What to do to itself, and at which moment; empty: nothing."""

    act = moment = ""


def meet(moment: str, *, holding: bool = True) -> None:
    """The worker is at ``moment``. ``holding``: it counts only with uncommitted work in hand, which a task that starts
    has not."""
    if Armed.moment == moment and (not holding or uncommitted()):
        end()


def end() -> None:
    """Returns only from being stopped."""
    act, moment, Armed.moment = Armed.act, Armed.moment, ""
    with (FOLDER / f"{NAME}.ends").open("a") as ends:
        ends.write(json.dumps({"act": act, "moment": moment, "uncommitted": uncommitted()}) + "\n")
    os.kill(os.getpid(), signal.SIGKILL if act == "kill" else signal.SIGSTOP)


def uncommitted() -> dict[str, list[int]]:
    """Source partition -> [committed position, position read], where the two differ or an agent is at a record."""
    found = {}
    for task in app.runtime.tasks.values():
        if task.phase not in (Phase.RUNNING, Phase.HELD) or task.work is None:
            continue
        for tp, read in task.work.resume_at().items():
            committed = int(task.committed_position(tp) or 0)
            if committed != read or task.work.dirty:
                found[tp_name(tp)] = [committed, int(read)]
    return found


class MortalProducer:
    """A task's producer around which the worker may end."""

    def __init__(self, inner: TaskProducer) -> None:
        self._inner, self.fence, self.send_offsets = inner, inner.fence, inner.send_offsets

    async def produce(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        meet("before produce")
        offsets = await self._inner.produce(records)
        meet("after produce")
        return offsets

    async def end(self, *, commit: bool) -> None:
        meet("before EndTxn")
        await self._inner.end(commit=commit)
        meet("after EndTxn")


def with_mortal_producers(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        transport = make()
        producer = transport.producer
        transport.producer = lambda transactional_id: MortalProducer(producer(transactional_id))
        return transport

    return made


def mortal(apply: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @wraps(apply)
    async def applied(self: Any, *arguments: Any, **named: Any) -> None:
        meet("before a sink", holding=False)
        await apply(self, *arguments, **named)
        meet("after a sink", holding=False)

    return applied


app.make_transport = with_mortal_producers(app.make_transport)  # type: ignore[method-assign]
for writer in (RedisWriter, PostgresWriter):
    setattr(writer, "apply", mortal(writer.apply))  # noqa: B010  # a plain assignment is refused by the type checker


# ---- told from outside


@app.task
async def listen() -> None:
    """What to do to itself; the harness's end is the worker's end too."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        Armed.act, _, Armed.moment = line.decode().strip().partition(" ")
        if Armed.moment == MOMENTS[0]:
            await end_within_an_epoch()
    signal.raise_signal(signal.SIGTERM)


async def end_within_an_epoch() -> None:
    """At any moment of the interval between two commits."""
    await app.clock.sleep(random.uniform(0, app.commit_interval_s))
    while not uncommitted():
        await app.clock.sleep(LOOK_S)
    end()


def show_tasks() -> None:
    """On SIGUSR1: what every coroutine waits for."""
    for running in asyncio.all_tasks():
        running.print_stack(limit=6)


# ---- telling


@app.task
async def tell() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, show_tasks)
    while not app.should_stop:
        tasks = list(app.runtime.tasks.values())
        positions = {tp_name(tp): task.committed_position(tp) for task in tasks for tp in sources(task)}
        status = {
            "tasks": {str(task.id): state(task) for task in tasks},
            "commits": sum(task.view.commits for task in tasks),
            "positions": {name: int(at or 0) for name, at in positions.items()},
        }
        temporary = FOLDER / f"{NAME}.json.new"
        temporary.write_text(json.dumps(status))
        temporary.rename(FOLDER / f"{NAME}.json")
        await app.clock.sleep(TELL_S)


def sources(task: Task) -> list[TopicPartition]:
    return [TopicPartition(topic, task.id.partition) for topic in task.env.group.sources]


def state(task: Task) -> str:
    """``quiet``: at the end of its input, all of it committed and in its sinks. Else what it is at, in words."""
    if task.phase is not Phase.RUNNING or task.work is None:
        return task.view.problem or task.phase.value
    if not all(task.env.fetcher.at_end(tp) for tp in sources(task)):
        return "reading"
    if task.work.dirty:
        return "committing"
    return "quiet" if all(feed.idle for feed in task.feeds) else "filling sinks"
