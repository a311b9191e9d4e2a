"""The in-memory sink keeps the sinks' contract, and can be broken as a test needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

pytest.register_assert_rewrite("contract.sink_suite")
from contract.sink_suite import HOUR_MS, Identity, Row, SinkContract, at, changed, opened, shape_of  # noqa: E402

from streamproc.core.errors import SinkUnavailable, UserError  # noqa: E402
from streamproc.sinks.contract import Sink, TableShape  # noqa: E402
from streamproc.testing.fake_sink import FakeSink  # noqa: E402


class FakePlace:
    """`contract.sink_suite.SinkPlace`; also its `Flaky`."""

    def __init__(self) -> None:
        self._sink = FakeSink()

    def sink(self) -> Sink:
        return self._sink

    def wrong(self) -> Sequence[Callable[[], Sink]]:
        def refuse() -> Sink:
            raise UserError("Nothing in memory can be wrong.", remedy="Nothing is needed.")

        return [refuse]

    async def rows(self, shape: TableShape) -> dict[Identity, Row]:
        return dict(self._sink.rows[shape.table])

    @asynccontextmanager
    async def flaky(self) -> AsyncIterator[FakeFlaky]:
        yield FakeFlaky(self._sink)

    def kill(self) -> None:
        self._sink.down = True

    def restart(self) -> None:
        self._sink.down = False


class FakeFlaky:
    def __init__(self, sink: FakeSink) -> None:
        self.sink = sink

    def break_midway(self) -> None:
        self.sink.fail_after(slices=3)

    def mend(self) -> None:
        self.sink.down = False


@pytest.fixture(scope="module")
def place() -> FakePlace:
    return FakePlace()


class TestFakeSink(SinkContract):
    pass


def test_a_failure_between_slices_shows_rows_that_the_ledger_does_not_know() -> None:
    async def scenario() -> None:
        sink, shape = FakeSink(), shape_of()
        async with opened(sink, shape) as writer:
            sink.fail_after(slices=1)
            with pytest.raises(SinkUnavailable):
                await writer.apply(
                    changed(shape, {(str(n), 0): (n, 0.0) for n in range(3_000)}), held=None, moved=at(1)
                )
            assert (len(sink.rows[shape.table]), sink.ledgers) == (2_000, {})

    asyncio.run(scenario())


def test_remembers_each_move_of_a_ledger_in_order() -> None:
    async def scenario() -> None:
        sink, shape = FakeSink(), shape_of()
        async with opened(sink, shape, 3) as writer:
            await writer.apply(None, held=None, moved=at(0))
            await writer.apply(changed(shape, {("DE", HOUR_MS): (1, 1.0)}), held=at(0), moved=at(2))
        assert sink.applied == [(shape.table, 3, at(0)), (shape.table, 3, at(2))]

    asyncio.run(scenario())
