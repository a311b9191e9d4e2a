"""Benchmark ``memory`` under load: the job of ``pipeline`` without its sinks, fed for as long as asked so that it never
waits for input.

    faust -A benchmarks.memory_load_job worker

The worker feeds itself, since an embedded log belongs to one process. The same orders come round after round, two hours of
event time later and under new ids each time; what is committed is deleted from the log. The file ``sent`` of its folder
says how many rounds there were once all of them are sent.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray

from benchmarks import pipeline_job
from benchmarks.marks import MeasuredApp, Settings, settings, settled
from benchmarks.orders import SPAN_MS, Orders, orders
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.ownerwork import OwnerWork
from streamproc.transport.contract import OutRecord

__all__ = ["POOL_RECORDS", "RSS", "SENT", "LoadSettings", "app", "build"]

POOL_RECORDS: Final = 200_000
"""One round: two hours of event time, so twelve of them are what the dedupe step remembers."""
WARM_ROUNDS: Final = 15
"""Ids are remembered for 24 hours and the rest of their bucket of three: 13.5 rounds."""
SEND_RECORDS: Final = 10_000
AHEAD_RECORDS: Final = 100_000
"""Sent and not yet committed: the job always has work, and the log stays small."""
SENT: Final = "sent"
RSS: Final = "rss"
POLL_S: Final = 0.005
LOOK_S: Final = 0.5
_TIME_BYTES: Final = 6
"""Of an event time of our days, as Avro writes it."""
_ID_AT: Final = 6
"""Where the order's id begins in a value: behind the head and its length."""
_ID_CHARS: Final = 8
"""Of the id, which say the round."""

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


class LoadSettings(Settings, frozen=True):
    """Settings, and how long the worker is loaded."""

    seconds: float = 0.0


def build(told: LoadSettings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, lambda app: (Path(told.folder) / SENT).exists())
    pipeline_job.declare(app, bounded=False)
    if told.seconds:
        warm = asyncio.Event()
        app.task(lambda: _feed(app, told, warm))
        app.task(lambda: _look(app, warm))
    return app


async def _feed(app: MeasuredApp, told: LoadSettings, warm: asyncio.Event) -> None:
    """``warm`` is set, and the load's seconds begin, when the dedupe step holds as many ids as it ever will."""
    await app.runtime.ready.wait()
    pool, rounds, sent = Pool(orders(POOL_RECORDS)), 0, 0
    began_s = app.clock.monotonic_s()
    while rounds < WARM_ROUNDS or app.clock.monotonic_s() - began_s < told.seconds:
        if rounds == WARM_ROUNDS:
            began_s = app.clock.monotonic_s()
            warm.set()
        pool.turn(rounds)
        for part in pool.orders.slices(SEND_RECORDS):
            await _until_committed(app, sent - AHEAD_RECORDS)
            await app.runtime.transport.send(_records(told.topic, part))
            sent += sum(map(len, part.values()))
        rounds += 1
        await app.runtime.transport.delete_records(_positions(app))
    await _until_committed(app, sent)
    while not await settled(app):
        await app.clock.sleep(POLL_S)
    (Path(told.folder) / SENT).write_text(str(rounds))


async def _until_committed(app: MeasuredApp, records: int) -> None:
    """At least one sleep, so that the job runs."""
    await app.clock.sleep(POLL_S)
    while sum(_positions(app).values()) < records:
        await app.clock.sleep(POLL_S)


async def _look(app: MeasuredApp, warm: asyncio.Event) -> None:
    """A line a look in the file ``rss``: seconds since the load began, bytes."""
    await warm.wait()
    process, began_s = psutil.Process(), app.clock.monotonic_s()
    with (Path(app.told.folder) / RSS).open("w") as file:
        while not app.should_stop:
            print(app.clock.monotonic_s() - began_s, process.memory_info().rss, file=file, flush=True)
            await app.clock.sleep(LOOK_S)


def _records(topic: str, part: dict[int, list[tuple[bytes, bytes]]]) -> dict[TopicPartition, list[OutRecord]]:
    return {
        TopicPartition(topic, number): [OutRecord(*record) for record in records] for number, records in part.items()
    }


def _positions(app: MeasuredApp) -> dict[TopicPartition, Offset]:
    """Committed positions of the orders; their partitions are written without gaps."""
    found = {TopicPartition(app.told.topic, id_.partition): task for id_, task in app.runtime.tasks.items()
             if not isinstance(task.work, OwnerWork)}  # fmt: skip
    return {tp: at for tp, task in found.items() if (at := task.committed_position(tp))}


class Pool:
    """Orders whose ids and event times can be moved to another round in place, a few nanoseconds each."""

    def __init__(self, first: Orders) -> None:
        self._first = first
        self._bytes = np.frombuffer(first.values, np.uint8).copy()
        self._begins = np.concatenate([[0], first.ends[:-1]])
        self._times_at, self._times = _event_times(self._bytes, self._begins)
        self.orders = first

    def turn(self, round_: int) -> None:
        """Make ``orders`` those of the ``round_``-th round."""
        digits = np.frombuffer(b"%0*x" % (_ID_CHARS, round_), np.uint8)
        self._bytes[(self._begins + _ID_AT)[:, None] + np.arange(_ID_CHARS)] = digits
        self._bytes[self._times_at[:, None] + np.arange(_TIME_BYTES)] = _varints(self._times + round_ * SPAN_MS)
        first = self._first
        self.orders = Orders(self._bytes.tobytes(), first.ends, first.users, first.partitions, first.parquet)


def _event_times(values: U8, begins: I64) -> tuple[I64, I64]:
    """Where each value's event time lies, and what it says."""
    at = begins + _ID_AT + 36
    at = _behind_varint(values, at)  # user_id
    for _ in ("country", "status"):
        at = at + 1 + values[at] // 2
    at = at + 8  # amount
    digits = values[at[:, None] + np.arange(_TIME_BYTES)].astype(np.int64) & 0x7F
    return at, (digits << (7 * np.arange(_TIME_BYTES))).sum(axis=1) >> 1


def _behind_varint(values: U8, at: I64) -> I64:
    more = np.ones(len(at), np.bool_)
    while more.any():
        more &= values[at] > 0x7F
        at = at + more
    return at + 1


def _varints(times: I64) -> U8:
    digits = (2 * times)[:, None] >> (7 * np.arange(_TIME_BYTES)) & 0x7F
    digits[:, :-1] |= 0x80
    return digits.astype(np.uint8)


app = build(settings(LoadSettings))
