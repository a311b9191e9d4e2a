"""The embedded transport passes the suite of all transports, and keeps what only a file promises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytest.register_assert_rewrite("contract.transport_suite")

from contract.transport_suite import OpenTransport, TransportContract  # noqa: E402

from streamproc.core.clock import SystemClock  # noqa: E402
from streamproc.transport.embedded import EmbeddedTransport  # noqa: E402


class EmbeddedLog:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.transport = EmbeddedTransport(path, SystemClock(), synchronous="NORMAL")

    async def reopen(self) -> EmbeddedTransport:
        await self.transport.stop()
        self.transport = EmbeddedTransport(self._path, SystemClock(), synchronous="NORMAL")
        await self.transport.start()
        return self.transport


@pytest.fixture
def open_transport(tmp_path: Path) -> OpenTransport:
    @asynccontextmanager
    async def opened() -> AsyncIterator[EmbeddedLog]:
        log = EmbeddedLog(tmp_path / "log.sqlite")
        await log.transport.start()
        yield log
        await log.transport.stop()

    return opened


class TestEmbedded(TransportContract):
    """Every test of the contract."""
