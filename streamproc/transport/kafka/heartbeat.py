"""A static member's heartbeat (version 3), which aiokafka does not speak: it carries the instance id, so that a member
whose place another process has taken is told so. The older versions would only say that the member is not known, and
aiokafka would join again and take the place back, for ever in turns.
"""

from __future__ import annotations

from typing import Any

from aiokafka.protocol.api import Request, RequestStruct  # type: ignore[import-untyped,unused-ignore]
from aiokafka.protocol.group import (  # type: ignore[import-untyped,unused-ignore]
    HeartbeatRequest_v1,
    HeartbeatResponse_v1,
)
from aiokafka.protocol.types import Int32, Schema, String  # type: ignore[import-untyped,unused-ignore]

__all__ = ["StaticHeartbeat"]


class _Response(HeartbeatResponse_v1):  # type: ignore[misc,unused-ignore]
    API_VERSION = 3


class _Struct(RequestStruct):  # type: ignore[misc,unused-ignore]
    API_KEY = HeartbeatRequest_v1.API_KEY
    API_VERSION = 3
    RESPONSE_TYPE = _Response
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class StaticHeartbeat(Request[_Struct]):  # type: ignore[misc,unused-ignore]
    """Brokers have answered it since Kafka 2.3; `Code.FENCED_INSTANCE_ID`: another process has the instance id now."""

    API_KEY = HeartbeatRequest_v1.API_KEY

    def __init__(self, group: str, generation: int, member_id: str, instance_id: str) -> None:
        self._fields = group, generation, member_id, instance_id

    def build(self, struct: type[Any]) -> Any:
        return struct(*self._fields)
