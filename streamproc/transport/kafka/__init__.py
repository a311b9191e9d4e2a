"""The Kafka transport: the only part of streamproc that imports aiokafka."""

from __future__ import annotations

from streamproc.transport.kafka.transport import KafkaTransport

__all__ = ["KafkaTransport"]
