"""One of the workers of benchmark ``partitions``: the job of ``pipeline`` behind a gate.

    faust -A benchmarks.partitions_job worker

It reads no order before there is a file ``go`` beside its folder: by then every worker has its tasks. The file
``status.json`` of its folder says how many it has, and whether they have done all that there was to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from benchmarks import pipeline_job
from benchmarks.marks import JobApp, Settings, settings
from benchmarks.wrapped import WrappedFetcher, WrappedTransport
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.task import Phase
from streamproc.transport.contract import Fetcher, Transport

__all__ = ["GO", "STATUS", "GateStatus", "app", "build"]

GO: Final = "go"
STATUS: Final = "status.json"
SAY_S: Final = 0.05


class GateStatus(msgspec.Struct, frozen=True):
    """What a worker says of itself."""

    running: int = 0
    """Tasks that have their state and their sinks."""
    finished: bool = False
    """They have done all there was to do; a worker without tasks has, too."""
    epochs: int = 0
    restarts: int = 0


class GatedApp(JobApp):
    """An app whose fetchers hold the orders back until the gate is open."""

    def __init__(self, told: Settings) -> None:
        super().__init__(told)
        self.gates: list[_GatedFetcher] = []
        if told.records:
            self.task(self._tell)

    def make_transport(self) -> Transport:
        transport = super().make_transport()
        return WrappedTransport(transport, self._gated) if self.told.records else transport

    def _gated(self, fetcher: Fetcher) -> Fetcher:
        gate = _GatedFetcher(fetcher, self.told.topic)
        self.gates.append(gate)
        return gate

    async def _tell(self) -> None:
        go = Path(self.told.folder).parent / GO
        while not self.should_stop:
            if go.exists():
                for gate in self.gates:
                    gate.open()
            new = Path(self.told.folder) / "status.new"
            new.write_bytes(msgspec.json.encode(self._status()))
            new.rename(new.with_name(STATUS))
            await self.clock.sleep(SAY_S)

    def _status(self) -> GateStatus:
        tasks = list(self.runtime.tasks.values())
        return GateStatus(
            sum(task.phase in (Phase.RUNNING, Phase.HELD) for task in tasks),
            all(task.finished() for task in tasks),
            sum(max(0, task.view.commits - 1) for task in tasks),  # the first only tells the incarnation
            sum(task.view.restarts for task in tasks),
        )


class _GatedFetcher(WrappedFetcher):
    """Remembers what is resumed of ``topic`` until `open`; all else is the fetcher's own."""

    def __init__(self, fetcher: Fetcher, topic: str) -> None:
        super().__init__(fetcher)
        self._topic = topic
        self._held: dict[TopicPartition, Offset] = {}
        self._open = False

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        if self._open or tp.topic != self._topic:
            super().resume(tp, position)
        else:
            self._held[tp] = position

    def pause(self, tp: TopicPartition) -> None:
        self._held.pop(tp, None)
        super().pause(tp)

    def open(self) -> None:
        held, self._held, self._open = self._held, {}, True
        for tp, position in held.items():
            super().resume(tp, position)


def build(told: Settings) -> GatedApp:
    """The app as ``told``."""
    app = GatedApp(told)
    pipeline_job.declare(app)
    return app


app = build(settings())
