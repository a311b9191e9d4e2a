"""Every name of aiokafka that we lean on although its documentation does not promise it.

aiokafka is pinned to one minor version; `tests/test_aiokafka_names.py` holds each of these against the installed one,
so that an upgrade fails there, by name, and not in a rebalance.
"""

from __future__ import annotations

from typing import Final

__all__ = ["PRIVATE_NAMES"]

PRIVATE_NAMES: Final[dict[str, str]] = {
    "aiokafka.client.AIOKafkaClient": "the client under the public consumer: bootstrap, ready, send, close",
    "aiokafka.client.AIOKafkaClient.send(group=)": "any hashable names a connection of its own",
    "aiokafka.client.AIOKafkaClient.coordinator_lookup": "FindCoordinator",
    "aiokafka.client.AIOKafkaClient.get_random_node": "a broker for questions that any can answer",
    "aiokafka.client.AIOKafkaClient.cluster": "leaders, brokers, controller",
    "aiokafka.client.CoordinationType": "GROUP, TRANSACTION",
    "aiokafka.cluster.ClusterMetadata.update_metadata": "takes the answer to our own MetadataRequest",
    "aiokafka.cluster.ClusterMetadata.leader_for_partition": "None or -1 without a leader",
    "aiokafka.protocol": "request classes: metadata, fetch, produce, transaction, offset, commit, admin, group",
    "aiokafka.protocol.fetch.FetchResponse_v11": "layout of an answer: aborted transactions, record set last",
    "aiokafka.coordinator.assignors.range.RangePartitionAssignor": "the default assignor",
    "aiokafka.coordinator.protocol.ConsumerProtocol.ASSIGNMENT": "what a SyncGroup answers: topics with partitions",
    "aiokafka.AIOKafkaConsumer._coordinator": "generation, member_id, check_errors",
    "aiokafka.consumer.group_coordinator.GroupCoordinator._send_req": "all its requests of the group protocol; replaced",
}
