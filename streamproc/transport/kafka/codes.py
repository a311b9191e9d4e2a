"""Error codes of the Kafka protocol that we act on, by what we do about them.

Source: the "Error Codes" table of the Kafka protocol guide. aiokafka's own classes stop short of the newer ones (74,
75, 78, 87, 90), so the numbers are kept here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = ["ASK_COORDINATOR_AGAIN", "ASK_LEADER_AGAIN", "FENCED", "FORBIDDEN", "TOO_LARGE", "Code", "name_of"]


class Code(IntEnum):
    UNKNOWN_SERVER_ERROR = -1
    NONE = 0
    OFFSET_OUT_OF_RANGE = 1
    CORRUPT_MESSAGE = 2
    UNKNOWN_TOPIC_OR_PARTITION = 3
    LEADER_NOT_AVAILABLE = 5
    NOT_LEADER_OR_FOLLOWER = 6
    REQUEST_TIMED_OUT = 7
    BROKER_NOT_AVAILABLE = 8
    REPLICA_NOT_AVAILABLE = 9
    MESSAGE_TOO_LARGE = 10
    NETWORK_EXCEPTION = 13
    COORDINATOR_LOAD_IN_PROGRESS = 14
    COORDINATOR_NOT_AVAILABLE = 15
    NOT_COORDINATOR = 16
    INVALID_TOPIC_EXCEPTION = 17
    RECORD_LIST_TOO_LARGE = 18
    NOT_ENOUGH_REPLICAS = 19
    NOT_ENOUGH_REPLICAS_AFTER_APPEND = 20
    ILLEGAL_GENERATION = 22
    UNKNOWN_MEMBER_ID = 25
    REBALANCE_IN_PROGRESS = 27
    TOPIC_AUTHORIZATION_FAILED = 29
    GROUP_AUTHORIZATION_FAILED = 30
    CLUSTER_AUTHORIZATION_FAILED = 31
    TOPIC_ALREADY_EXISTS = 36
    INVALID_PARTITIONS = 37
    INVALID_REPLICATION_FACTOR = 38
    INVALID_CONFIG = 40
    NOT_CONTROLLER = 41
    POLICY_VIOLATION = 44
    OUT_OF_ORDER_SEQUENCE_NUMBER = 45
    DUPLICATE_SEQUENCE_NUMBER = 46
    INVALID_PRODUCER_EPOCH = 47
    INVALID_TXN_STATE = 48
    INVALID_PRODUCER_ID_MAPPING = 49
    INVALID_TRANSACTION_TIMEOUT = 50
    CONCURRENT_TRANSACTIONS = 51
    TRANSACTION_COORDINATOR_FENCED = 52
    TRANSACTIONAL_ID_AUTHORIZATION_FAILED = 53
    OPERATION_NOT_ATTEMPTED = 55
    KAFKA_STORAGE_ERROR = 56
    UNKNOWN_PRODUCER_ID = 59
    FENCED_LEADER_EPOCH = 74
    UNKNOWN_LEADER_EPOCH = 75
    OFFSET_NOT_AVAILABLE = 78
    UNSTABLE_OFFSET_COMMIT = 88
    INVALID_RECORD = 87
    PRODUCER_FENCED = 90
    TRANSACTIONAL_ID_NOT_FOUND = 105
    TRANSACTION_ABORTABLE = 120


ASK_LEADER_AGAIN: Final = frozenset({
    Code.UNKNOWN_TOPIC_OR_PARTITION, Code.LEADER_NOT_AVAILABLE, Code.NOT_LEADER_OR_FOLLOWER,
    Code.REQUEST_TIMED_OUT, Code.BROKER_NOT_AVAILABLE, Code.REPLICA_NOT_AVAILABLE, Code.NETWORK_EXCEPTION,
    Code.NOT_ENOUGH_REPLICAS, Code.NOT_ENOUGH_REPLICAS_AFTER_APPEND, Code.KAFKA_STORAGE_ERROR, Code.FENCED_LEADER_EPOCH,
    Code.UNKNOWN_LEADER_EPOCH, Code.OFFSET_NOT_AVAILABLE, Code.NOT_CONTROLLER, Code.CONCURRENT_TRANSACTIONS,
    Code.COORDINATOR_LOAD_IN_PROGRESS, Code.COORDINATOR_NOT_AVAILABLE, Code.NOT_COORDINATOR,
})  # fmt: skip
"""From a leader: refresh the metadata and send the same again. A coordinator's codes come through a leader too, when it
verifies a transaction."""

ASK_COORDINATOR_AGAIN: Final = frozenset({
    Code.COORDINATOR_LOAD_IN_PROGRESS, Code.COORDINATOR_NOT_AVAILABLE, Code.NOT_COORDINATOR, Code.REQUEST_TIMED_OUT,
    Code.CONCURRENT_TRANSACTIONS, Code.UNKNOWN_TOPIC_OR_PARTITION, Code.OPERATION_NOT_ATTEMPTED,
    Code.KAFKA_STORAGE_ERROR, Code.UNSTABLE_OFFSET_COMMIT, Code.LEADER_NOT_AVAILABLE, Code.NOT_LEADER_OR_FOLLOWER,
})  # fmt: skip
"""From a coordinator: look it up again and send the same again. 'Operation not attempted' stands beside the partition
whose error was the reason."""

FENCED: Final = frozenset({
    Code.INVALID_PRODUCER_EPOCH, Code.PRODUCER_FENCED, Code.TRANSACTIONAL_ID_NOT_FOUND,
    Code.INVALID_PRODUCER_ID_MAPPING, Code.INVALID_TXN_STATE, Code.TRANSACTION_COORDINATOR_FENCED,
    Code.UNKNOWN_PRODUCER_ID, Code.TRANSACTION_ABORTABLE,
})  # fmt: skip
"""Somebody else owns the transactional id, or the transaction or the id timed out: the task starts from its fence."""

TOO_LARGE: Final = frozenset({Code.MESSAGE_TOO_LARGE, Code.RECORD_LIST_TOO_LARGE})

FORBIDDEN: Final = frozenset({
    Code.TOPIC_AUTHORIZATION_FAILED, Code.GROUP_AUTHORIZATION_FAILED, Code.CLUSTER_AUTHORIZATION_FAILED,
    Code.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
})  # fmt: skip
"""Only an operator can mend these."""


def name_of(code: int) -> str:
    """The protocol guide's name, or the number of one that is not in our list."""
    try:
        return Code(code).name
    except ValueError:
        return f"error {code}"
