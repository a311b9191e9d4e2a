"""A sink that can be down, slow, fail half-way, lose an answer and be rolled back to an older backup."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import cast

from streamproc.commit.ledger import Ledger
from streamproc.core.errors import LedgerMoved, SinkUnavailable
from streamproc.core.partitioner import partition_of
from streamproc.operators.groupkeys import encode_group_key
from streamproc.sinks.contract import SinkRows, TableShape
from streamproc.testing.fake_sink import FakeSink, FakeWriter, Identity, Row
from streamproc.testing.simulation.broker import Weather
from streamproc.testing.simulation.loop import Process, current_process
from streamproc.testing.simulation.watch import Watch

__all__ = ["SimulatedSink"]

_FAR_MS = 400 * 24 * 3_600_000
"""Beyond every window of a table."""


class SimulatedSink(FakeSink):
    """One for the whole run, under the name the application's own sink has."""

    def __init__(self, name: str, weather: Weather, watch: Watch) -> None:
        super().__init__(name)
        self.weather, self.watch = weather, watch
        self._backup: tuple[dict[str, dict[Identity, Row]], dict[tuple[str, str, int], Ledger]] | None = None
        self._shapes: dict[str, TableShape] = {}

    def writer(self, shape: TableShape, app_id: str, partition: int) -> FakeWriter:
        process = current_process()
        assert process is not None
        self._shapes[shape.table] = shape
        return SimulatedWriter(self, shape, app_id, partition, process)

    def back_up(self) -> None:
        """One without a ledger, or with an unfinished rebuild, is none: the state it is made anew from may have let go
        of rows by then."""
        if self.ledgers and all(ledger.epoch >= 0 for ledger in self.ledgers.values()):
            self._backup = copy.deepcopy((self.rows, self.ledgers))

    def stain(self, lives: Callable[[str, int], bool]) -> None:
        """Put a row into each table that nobody wrote, in a partition of which ``lives`` says that its task has rows: a
        rebuild removes it."""
        for table, rows in self.rows.items():
            shape = self._shapes[table]
            for *keys, _ in list(rows):
                partition = partition_of(encode_group_key(tuple(keys), shape.keys), shape.partitions)
                if lives(table, partition):
                    latest = max(cast(int, start) for *_, start in rows)
                    rows[*keys, latest + _FAR_MS] = {}
                    self.weather.note("stray row in a sink")
                    break

    def roll_back(self) -> bool:
        """Bring the last backup back, if there is one."""
        if self._backup is None or self._backup[1].keys() != self.ledgers.keys():
            return False
        self.rows, self.ledgers = copy.deepcopy(self._backup)  # type: ignore[assignment]
        return True


class SimulatedWriter(FakeWriter):
    """See `sinks.contract.SinkWriter`; each call is a request and an answer."""

    def __init__(self, sink: SimulatedSink, shape: TableShape, app_id: str, partition: int, process: Process) -> None:
        super().__init__(sink, shape, app_id, partition)
        self._world, self._process = sink, process
        self._task = (f"table-{shape.table}", partition)

    async def open(self) -> None:
        await self._arrives("open")
        await super().open()

    async def read(self) -> Ledger | None:
        await self._arrives("read")
        return await super().read()

    async def apply(self, rows: SinkRows | None, *, held: Ledger | None, moved: Ledger) -> None:
        await self._arrives("apply")
        found = self._world.ledgers.get(self._owner)
        self._world.watch.sunk(self._process, self._world.name, self._task, found, held, moved)
        weather = self._world.weather
        if rows is not None and weather.strikes(weather.sink, "sink half-way"):
            self._world.fail_after(weather.dice.randrange(3))
        try:
            await super().apply(rows, held=held, moved=moved)
        except LedgerMoved:
            weather.note("ledger had moved")
            raise
        finally:
            self._world.mend()
        if weather.strikes(weather.sink, "sink asked twice"):
            await super().apply(rows, held=held, moved=moved)
        await self._returns("apply")

    async def prune(self, live: Collection[tuple[object, ...]], *, since_ms: int, mine: Callable[[tuple[object, ...]], bool],
                    held: Ledger) -> int:  # fmt: skip
        await self._arrives("prune")
        gone = await super().prune(live, since_ms=since_ms, mine=mine, held=held)
        self._world.weather.note("sink rebuilt")
        await self._returns("prune")
        return gone

    async def _arrives(self, call: str) -> None:
        self._world.watch.require_alive(self._process, f"a sink's {call}")
        await self._world.weather.pass_time()
        if self._world.weather.strikes(self._world.weather.sink, f"sink: lost request: {call}"):
            raise SinkUnavailable(f"The simulation lost the sink's {call}.")

    async def _returns(self, call: str) -> None:
        await self._world.weather.pass_time()
        if self._world.weather.strikes(self._world.weather.sink, f"sink: lost answer: {call}"):
            raise SinkUnavailable(f"The simulation lost the answer to the sink's {call}.")
