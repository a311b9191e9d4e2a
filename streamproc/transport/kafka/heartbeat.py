"""What a static member says to its group and aiokafka does not speak: both requests carry the instance id.

By its heartbeat (version 3) a member whose place another process has taken is told so. The older versions would only say
that the member is not known, and aiokafka would join again and take the place back, for ever in turns. Leaving (version
3) makes the group share anew, which a static member's coming back does not.
"""

from __future__ import annotations

from typing import Any

from aiokafka.protocol.api import Request, RequestStruct  # type: ignore[import-untyped,unused-ignore]
from aiokafka.protocol.group import (  # type: ignore[import-untyped,unused-ignore]
    HeartbeatRequest_v1,
    HeartbeatResponse_v1,
    LeaveGroupRequest_v1,
    LeaveGroupResponse_v1,
)
from aiokafka.protocol.types import Array, Int16, Int32, Schema, String  # type: ignore[import-untyped,unused-ignore]

__all__ = ["StaticHeartbeat", "StaticLeave"]


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


class _LeaveResponse(LeaveGroupResponse_v1):  # type: ignore[misc,unused-ignore]
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        (
            "members",
            Array(("member_id", String("utf-8")), ("group_instance_id", String("utf-8")), ("error_code", Int16)),
        ),
    )


class _LeaveStruct(RequestStruct):  # type: ignore[misc,unused-ignore]
    API_KEY = LeaveGroupRequest_v1.API_KEY
    API_VERSION = 3
    RESPONSE_TYPE = _LeaveResponse
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("members", Array(("member_id", String("utf-8")), ("group_instance_id", String("utf-8")))),
    )


class StaticLeave(Request[_LeaveStruct]):  # type: ignore[misc,unused-ignore]
    """Brokers have answered it since Kafka 2.4. What became of the one member stands in the answer's ``members``."""

    API_KEY = LeaveGroupRequest_v1.API_KEY

    def __init__(self, group: str, member_id: str, instance_id: str) -> None:
        self._fields = group, [(member_id, instance_id)]

    def build(self, struct: type[Any]) -> Any:
        return struct(*self._fields)
