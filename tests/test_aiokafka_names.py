"""Each name of aiokafka that we lean on is there and behaves as we think; an upgrade fails here, by name."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import aiokafka
import pytest
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.cluster import ClusterMetadata
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocol
from aiokafka.protocol import admin, commit, fetch, group, metadata, offset, produce, transaction

from streamproc.core.types import TopicPartition
from streamproc.transport.kafka.heartbeat import StaticHeartbeat, StaticLeave
from streamproc.transport.kafka.names import PRIVATE_NAMES
from streamproc.transport.kafka.wire import by_topic, kafka_tp

FETCHED = by_topic([(TopicPartition("t", 0), (0, 5, 1 << 20))])
COMMITTED = [("t", [(0, 5, "")])]
CREATED: list[Any] = [("t", 1, -1, [], [("cleanup.policy", "compact")])]


def parameters(function: object) -> list[str]:
    assert callable(function)
    return list(inspect.signature(function).parameters)


def names_of(schema: object) -> list[str]:
    return list(schema.names)  # type: ignore[attr-defined]


def test_the_list_names_what_these_tests_cover() -> None:
    assert len(PRIVATE_NAMES) == 14
    assert aiokafka.__version__.startswith("0.14.")


@pytest.mark.parametrize("name", ["bootstrap", "ready", "send", "close", "coordinator_lookup", "get_random_node"])
def test_the_client_has_its_methods(name: str) -> None:
    assert callable(getattr(AIOKafkaClient, name))


def test_send_and_ready_take_any_group_as_a_connection() -> None:
    assert parameters(AIOKafkaClient.send) == ["self", "node_id", "request", "group"]
    assert parameters(AIOKafkaClient.ready) == ["self", "node_id", "group"]

    async def scenario() -> None:
        client = AIOKafkaClient(bootstrap_servers="127.0.0.1:1", request_timeout_ms=100)
        assert not await client.ready(7, group=("any", "hashable"))
        await client.close()

    asyncio.run(scenario())


def test_coordinators_are_of_two_types() -> None:
    assert (CoordinationType.GROUP, CoordinationType.TRANSACTION) == (0, 1)
    assert parameters(AIOKafkaClient.coordinator_lookup) == ["self", "coordinator_type", "coordinator_key"]


def test_cluster_takes_an_answer_and_tells_leaders_brokers_and_controller() -> None:
    cluster = ClusterMetadata()
    partitions = [(0, 0, 5, [5], [5]), (5, 1, -1, [5], [])]
    answer = metadata.MetadataResponse_v1([(5, "host", 9092, None)], 5, [(0, "t", False, partitions)])
    cluster.update_metadata(answer)
    assert cluster.leader_for_partition(kafka_tp(TopicPartition("t", 0))) == 5
    assert cluster.leader_for_partition(kafka_tp(TopicPartition("t", 1))) == -1
    assert cluster.leader_for_partition(kafka_tp(TopicPartition("u", 0))) is None
    assert [broker.nodeId for broker in cluster.brokers()] == [5]
    assert cluster.controller.nodeId == 5


def test_a_metadata_request_can_forbid_making_topics() -> None:
    built = metadata.MetadataRequest(["t"], allow_auto_topic_creation=False).build(metadata.MetadataRequest_v5)
    assert (built.topics, built.allow_auto_topic_creation) == (["t"], False)


def test_a_fetch_answer_has_the_columns_that_are_read_by_place() -> None:
    fields = fetch.FetchResponse_v11.SCHEMA.fields[-1].array_of.fields[-1].array_of
    assert names_of(fields)[:4] == ["partition", "error_code", "highwater_offset", "last_stable_offset"]
    assert names_of(fields)[4:6] == ["log_start_offset", "aborted_transactions"]
    assert names_of(fields)[-1] == "message_set"
    four = fetch.FetchResponse_v4.SCHEMA.fields[-1].array_of.fields[-1].array_of
    assert names_of(four)[4:] == ["aborted_transactions", "message_set"]


def test_a_produce_answer_has_partition_code_and_offset_first() -> None:
    fields = produce.ProduceResponse_v7.SCHEMA.fields[0].array_of.fields[-1].array_of
    assert names_of(fields)[:3] == ["partition", "error_code", "offset"]


@pytest.mark.parametrize(
    ("request_", "struct"),
    [
        (fetch.FetchRequest(200, 1, 1 << 20, 1, FETCHED), fetch.FetchRequest_v11),
        (produce.ProduceRequest("id", -1, 5_000, [("t", [(0, b"batch")])]), produce.ProduceRequest_v7),
        (transaction.InitProducerIdRequest("id", 15_000), transaction.InitProducerIdRequest_v0),
        (transaction.AddPartitionsToTxnRequest("id", 1, 2, [("t", [0])]), transaction.AddPartitionsToTxnRequest_v0),
        (transaction.AddOffsetsToTxnRequest("id", 1, 2, "group"), transaction.AddOffsetsToTxnRequest_v0),
        (transaction.TxnOffsetCommitRequest("id", "g", 1, 2, COMMITTED), transaction.TxnOffsetCommitRequest_v0),
        (transaction.EndTxnRequest("id", 1, 2, True), transaction.EndTxnRequest_v0),
        (offset.OffsetRequest(-1, 1, [("t", [(0, -1)])]), offset.OffsetRequest_v3),
        (commit.OffsetFetchRequest("group", [("t", [0])]), commit.OffsetFetchRequest_v3),
        (admin.CreateTopicsRequest(CREATED, 5_000, False), admin.CreateTopicsRequest_v3),
        (admin.DescribeConfigsRequest([(2, "t", ["cleanup.policy"])]), admin.DescribeConfigsRequest_v2),
        (admin.DeleteRecordsRequest([("t", [(0, 5)])], 5_000), admin.DeleteRecordsRequest_v2),
        (group.HeartbeatRequest("group", 3, "member"), group.HeartbeatRequest_v1),
        (StaticHeartbeat("group", 3, "member", "instance"), StaticHeartbeat._CLASSES[0]),
        (StaticLeave("group", "member", "instance"), StaticLeave._CLASSES[0]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_request_is_built_from_our_arguments_and_encodes(request_: object, struct: type) -> None:
    built = request_.build(struct)  # type: ignore[attr-defined]
    assert isinstance(built.encode(), bytes)


def test_the_default_assignor_gives_a_member_the_same_numbers_of_all_topics() -> None:
    cluster = ClusterMetadata()
    partitions = [(0, p, 5, [5], [5]) for p in range(4)]
    topics = [(0, name, False, partitions) for name in ("a", "b")]
    cluster.update_metadata(metadata.MetadataResponse_v1([(5, "host", 9092, None)], 5, topics))
    members = {name: RangePartitionAssignor.metadata(["a", "b"]) for name in ("one", "two")}
    for assigned in RangePartitionAssignor.assign(cluster, members).values():
        numbers = {topic: sorted(numbers) for topic, numbers in assigned.assignment}
        assert numbers["a"] == numbers["b"]
        assert len(numbers["a"]) == 2


def test_an_assignment_is_topics_with_partitions() -> None:
    encoded = ConsumerProtocol.ASSIGNMENT(0, [("a", [0, 2])], b"told").encode()
    given = ConsumerProtocol.ASSIGNMENT.decode(encoded)
    assert [(topic, numbers) for topic, numbers in given.assignment] == [("a", [0, 2])]
    assert given.user_data == b"told"


def test_the_consumer_keeps_its_coordinator_with_generation_member_and_errors() -> None:
    async def scenario() -> None:
        consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers="127.0.0.1:1", group_id="g")
        assert consumer._coordinator is None
        with pytest.raises(aiokafka.errors.KafkaConnectionError):
            await consumer.start()
        await consumer.stop()

    asyncio.run(scenario())
    assert callable(GroupCoordinator.check_errors)
    source = inspect.getsource(GroupCoordinator.__init__)
    assert "self.generation = " in source
    assert "self.member_id = " in source
    assert parameters(GroupCoordinator._send_req) == ["self", "request"]
    assert "resp = await self._send_req(request)" in inspect.getsource(GroupCoordinator._do_heartbeat)
    assert "self._coordinator = GroupCoordinator(" in inspect.getsource(aiokafka.AIOKafkaConsumer.start)


def test_the_consumer_takes_our_time_outs_and_a_group_that_is_never_polled() -> None:
    taken = parameters(aiokafka.AIOKafkaConsumer.__init__)
    for name in ("max_poll_interval_ms", "rebalance_timeout_ms", "session_timeout_ms", "heartbeat_interval_ms"):
        assert name in taken
    assert "partition_assignment_strategy" in taken
