"""A pipeline's source side: one topic partition decoded, judged, deduplicated and aggregated into partials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamproc.avro.decode import Decoder
from streamproc.commit.record import CommitRecord, tp_name
from streamproc.core.batch import RawBatch
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators.contract import SideRecord, WatermarkState
from streamproc.operators.plan import SourcePlan
from streamproc.operators.source import Collected, Counters, SourceProgram
from streamproc.runtime.work import Work
from streamproc.transport.contract import OutColumns, OutRecord

__all__ = ["SourceWork", "side_record"]


class SourceWork(Work):
    """Everything happens inside `process`; so a barrier between two batches has nothing to wait for."""

    def __init__(self, plan: SourcePlan, decoder: Decoder, partition: int, sources: int,
                 repartition: Callable[[str], str]) -> None:  # fmt: skip
        super().__init__()
        self.plan, self._decoder, self._sources, self._repartition = plan, decoder, sources, repartition
        self.tp = TopicPartition(plan.topic, partition)
        self._collected: Collected | None = None

    def open(self, record: CommitRecord, overlays: Mapping[str, Any]) -> None:
        name = tp_name(self.tp)
        self._position = record.positions[self.plan.name][name]
        self._end = record.ends.get(name)
        clock = record.watermarks.get(self.plan.name, {}).get(name)
        if clock is not None:
            # A restart is not idleness: what was written meanwhile must be read before others may go ahead of it.
            clock = WatermarkState(clock.watermark)
        self.program = SourceProgram(self.plan, self.tp.partition, self._sources, self._decoder, overlays, clock)
        self._records = 0
        self._committed_clock = self.program.snapshot()
        self._finish_if_at_end()

    def resume_at(self) -> dict[TopicPartition, Offset]:
        return {} if self._ended else {self.tp: Offset(self._position)}

    @property
    def _ended(self) -> bool:
        return self._end is not None and self._position >= self._end

    @property
    def finished(self) -> bool:
        return self._ended

    def process(self, batch: RawBatch) -> None:
        if self._ended:
            return
        if self._end is not None and len(batch) and int(batch.offsets[-1]) >= self._end:
            batch = batch.rows(0, int(batch.offsets.searchsorted(self._end)))
            self._position = self._end
        else:
            self._position = batch.next_position
        if len(batch):
            self._records += len(batch)
            self.program.process(batch)
        self._finish_if_at_end()

    def _finish_if_at_end(self) -> None:
        if self._ended:
            self.program.end()

    def tick(self, monotonic_ms: int, at_end: Callable[[TopicPartition], bool]) -> None:
        if not self._ended:
            self.program.tick(monotonic_ms, at_end(self.tp))

    def collect(self, epoch: int) -> None:
        self._collected = self.program.collect(epoch)

    def outputs(self) -> Mapping[TopicPartition, Sequence[OutRecord]]:
        found: dict[TopicPartition, list[OutRecord]] = {}
        assert self._collected is not None
        for table, partials in self._collected.partials.items():
            topic = self._repartition(table)
            for partial in partials:
                target = found.setdefault(TopicPartition(topic, partial.destination), [])
                target.extend(OutRecord(None, payload) for payload in partial.payloads)
        for side in self._collected.side:
            target = found.setdefault(TopicPartition(side.topic, self.tp.partition), [])
            target.append(side_record(side))
        forwarded: dict[TopicPartition, Sequence[OutRecord]] = {}
        for topic, parts in self._collected.forwarded.items():
            target_tp, records = TopicPartition(topic, self.tp.partition), OutColumns(*parts)
            # A topic may take late records as well.
            forwarded[target_tp] = [*records, *found[target_tp]] if target_tp in found else records
        return found | forwarded

    def positions(self) -> dict[str, dict[str, int]]:
        return {self.plan.name: {tp_name(self.tp): int(self._position)}}

    def watermarks(self) -> dict[str, dict[str, WatermarkState]]:
        return {self.plan.name: {tp_name(self.tp): self.program.snapshot()}}

    def committed(self, record: CommitRecord) -> None:
        self._collected = None
        self._records = 0
        self._committed_clock = self.program.snapshot()

    @property
    def dirty(self) -> bool:
        return self._records > 0 or self.program.snapshot() != self._committed_clock

    @property
    def size_bytes(self) -> int:
        return self.program.size_bytes

    @property
    def counters(self) -> Counters:
        return self.program.counters


def side_record(side: SideRecord) -> OutRecord:
    return OutRecord(side.key, side.value, side.headers)
