"""A table's owner side: partial aggregates of all upstream tasks merged where their key lives, windows closed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import polars as pl

from streamproc.commit.record import CommitRecord, tp_name
from streamproc.core.batch import RawBatch
from streamproc.core.errors import invariant
from streamproc.core.types import END_OF_TIME, Offset, TopicPartition
from streamproc.eventtime.watermark import MinWatermark
from streamproc.operators.contract import WatermarkState
from streamproc.operators.partials import decode_partial
from streamproc.operators.plan import TablePlan
from streamproc.operators.source import Counters
from streamproc.operators.windowtable import LateAggregate, WindowTable
from streamproc.runtime.work import Work
from streamproc.transport.contract import OutRecord

__all__ = ["OwnerWork"]


class OwnerWork(Work):
    """Reads one partition of a table's repartition topic, to which every upstream task writes."""

    prompt = True

    def __init__(self, plan: TablePlan, topic: str, partition: int, sources: int) -> None:
        super().__init__()
        self.plan, self._sources = plan, sources
        self.tp = TopicPartition(topic, partition)

    def open(self, record: CommitRecord, overlays: Mapping[str, Any]) -> None:
        self._position = record.positions[self.plan.name][tp_name(self.tp)]
        self._sinks_epoch = 0
        states = {int(source): state for source, state in record.watermarks.get(self.plan.name, {}).items()}
        self._clock = MinWatermark(self._sources, states)
        self.table = WindowTable(self.plan, overlays[self.plan.name])
        self.table.restore()
        self._late: list[OutRecord] = []
        self._records = 0
        self._counters = Counters()

    @property
    def watermark(self) -> int:
        return self._clock.watermark

    @property
    def finished(self) -> bool:
        return self._clock.watermark == END_OF_TIME

    def resume_at(self) -> dict[TopicPartition, Offset]:
        return {self.tp: Offset(self._position)}

    def process(self, batch: RawBatch) -> None:
        for row in range(len(batch)):
            payload = batch.value(row)
            invariant(payload is not None, f"A record without a value in {self.tp}.")
            assert payload is not None
            header, rows = decode_partial(payload)
            invariant(header.sources == self._sources and header.table == self.plan.name,
                      f"{self.tp} holds a partial of {header.table} from {header.sources} tasks.")  # fmt: skip
            if len(rows):  # else it only tells the watermark
                self._late += (_late_record(late) for late in self.table.apply(header, rows, self._clock.watermark))
            if header.part == header.parts - 1:
                self._clock.update(header.source, header.watermark, header.idle)
        self._records += len(batch)
        self._position = batch.next_position

    def expire(self, sinks_epoch: int) -> None:
        self._sinks_epoch = sinks_epoch

    def collect(self, epoch: int) -> None:
        self.table.advance(self._clock.watermark, epoch)
        self.table.expire(self._clock.watermark, self._sinks_epoch)
        self.table.collect(epoch)

    def outputs(self) -> dict[TopicPartition, list[OutRecord]]:
        return {TopicPartition(self.plan.late_topic, self.tp.partition): list(self._late)} if self._late else {}

    def positions(self) -> dict[str, dict[str, int]]:
        return {self.plan.name: {tp_name(self.tp): int(self._position)}}

    def watermarks(self) -> dict[str, dict[str, WatermarkState]]:
        return {self.plan.name: {str(source): state for source, state in self._clock.states().items()}}

    def committed(self, record: CommitRecord) -> None:
        self._counters.records += self._records
        if self._late:
            self._counters.late[self.plan.name] = self._counters.late.get(self.plan.name, 0) + len(self._late)
        self._records = 0
        self._late = []

    @property
    def dirty(self) -> bool:
        return self._records > 0

    @property
    def size_bytes(self) -> int:
        return self.table.size_bytes

    @property
    def counters(self) -> Counters:
        return self._counters

    def tick(self, monotonic_ms: int, at_end: Callable[[TopicPartition], bool]) -> None:
        """An upstream task is never idled by its owner's clock: only it knows."""

    def results(self, rows: Iterable[tuple[bytes, bytes]]) -> pl.DataFrame:
        return self.table.results(rows)


def _late_record(late: LateAggregate) -> OutRecord:
    """A late aggregate: the row as a partial of its own, so that it can be merged if it is sent back."""
    return OutRecord(late.keys, late.payload, late.headers())
