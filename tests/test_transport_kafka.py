"""The Kafka transport against a real broker: the contract every transport keeps, and what only a broker can do to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from streamproc.core.clock import SystemClock
from streamproc.testing.kafka_server import KafkaServer, can_start
from streamproc.transport.contract import Transport
from streamproc.transport.kafka import KafkaTransport

pytest.register_assert_rewrite("contract.transport_suite")
from contract.transport_suite import OpenTransport, TransportContract  # noqa: E402

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def kafka() -> Iterator[KafkaServer]:
    if not can_start():
        pytest.skip("no Java and Maven for a real Kafka, and KAFKA_BOOTSTRAP is not set")
    with KafkaServer() as server:
        yield server


class Log:
    """A started transport on the module's broker."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self.transport: Transport = self._new()

    def _new(self) -> KafkaTransport:
        return KafkaTransport(
            self._bootstrap,
            SystemClock(),
            client_id="contract",
            session_timeout_s=6.0,
            heartbeat_interval_s=0.2,
        )

    async def reopen(self) -> Transport:
        await self.transport.stop()
        self.transport = self._new()
        await self.transport.start()
        return self.transport


@pytest.fixture
def open_transport(kafka: KafkaServer) -> OpenTransport:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Log]:
        log = Log(kafka.bootstrap)
        await log.transport.start()
        try:
            yield log
        finally:
            await log.transport.stop()

    return opened


class TestKafka(TransportContract):
    pass
