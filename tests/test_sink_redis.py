"""The Redis sink on a real server (Valkey): the sinks' contract, alone and on a node of a cluster, and what is Redis's
own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from redis import Redis

pytest.register_assert_rewrite("contract.sink_suite")
from contract.sink_suite import HOUR_MS, Identity, Row, SinkContract, at, changed, opened, shape_of  # noqa: E402

from streamproc.core.errors import SinkUnavailable, UserError  # noqa: E402
from streamproc.sinks.contract import Sink, SinkRows, TableShape  # noqa: E402
from streamproc.sinks.redis import redis, row_key  # noqa: E402
from streamproc.testing.servers import Cable, EmbeddedRedis  # noqa: E402

pytestmark = pytest.mark.server


class RedisPlace:
    """`contract.sink_suite.SinkPlace` on one server."""

    def __init__(self, folder: Path, **config: str) -> None:
        # "always": what was answered before a kill must be there after it, or the suite could not tell loss from lies.
        self.server = EmbeddedRedis(folder, tcp=True, config={"appendfsync": "always", **config}).start()

    @property
    def client(self) -> Redis:
        return Redis.from_url(self.server.url, decode_responses=True)

    def sink(self) -> Sink:
        return redis(self.server.url)

    def wrong(self) -> Sequence[Callable[[], Sink]]:
        return [
            lambda: redis("http://user:secret@localhost"),
            lambda: redis("localhost:6379"),
            lambda: redis("redis://user:secret@localhost:port/0"),
            lambda: redis("redis://:secret@localhost/base"),
            lambda: redis("unix://"),
            lambda: redis(f"unix://nobody:secret@{self.server.socket}"),
            lambda: redis(f"{self.server.url}?db=99"),
            lambda: redis(f"{self.server.url}?socket_timeout=secret"),
        ]

    async def rows(self, shape: TableShape) -> dict[Identity, Row]:
        client, found = self.client, {}
        for key in client.scan_iter(match=f"{{{shape.table}:*", count=5_000):
            if key.endswith("}:ledger"):
                continue
            *parts, start = key.split("}:", 1)[1].split(":")
            identity = [_value(part, dtype) for part, dtype in zip(parts, shape.keys.values(), strict=True)]
            found[key] = (*identity, int(start))
        pipeline = client.pipeline(transaction=False)
        for key in found:
            pipeline.hgetall(key)
        hashes: list[dict[str, str]] = pipeline.execute()
        rows = {identity: _row(fields, shape) for identity, fields in zip(found.values(), hashes, strict=True)}
        client.close()
        return rows

    @asynccontextmanager
    async def flaky(self) -> AsyncIterator[RedisFlaky]:
        async with Cable(self.server.socket, self.server.socket.with_name("cut.sock")) as cable:
            yield RedisFlaky(cable)

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.restart()


class RedisFlaky:
    def __init__(self, cable: Cable) -> None:
        self.sink, self._cable = redis(f"unix://{cable.path}"), cable

    def break_midway(self) -> None:
        self._cable.cut_after(600_000)

    def mend(self) -> None:
        self._cable.mend()


def _value(text: str, dtype: pl.DataType) -> object:
    if text == "%00":
        return None
    if dtype == pl.String:
        for plain, escaped in ((":", "%3A"), ("{", "%7B"), ("}", "%7D"), ("%", "%25")):
            text = text.replace(escaped, plain)
        return text
    return _plain(text, dtype)


def _plain(text: str, dtype: pl.DataType) -> object:
    if dtype == pl.Boolean:
        return {"1": True, "0": False}[text]
    if dtype == pl.Date:
        return date.fromisoformat(text)
    if dtype.is_float():
        return float(text)
    return text if dtype == pl.String else int(text)


def _row(fields: dict[str, str], shape: TableShape) -> Row:
    values = {n: _plain(fields[n], t) if n in fields else None for n, t in shape.columns.items()}
    return {"window_end": int(fields["window_end"]), **values}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisPlace]:
    place = RedisPlace(tmp_path_factory.mktemp("redis"))
    yield place
    place.server.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisPlace]:
    """The only node of a cluster: it refuses a call whose keys are of different slots."""
    place = RedisPlace(tmp_path_factory.mktemp("node"), **{"cluster-enabled": "yes"})
    place.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    while place.client.cluster("INFO")["cluster_state"] != "ok":
        pass
    yield place
    place.server.stop()


class TestRedis(SinkContract):
    @pytest.fixture
    def place(self, alone: RedisPlace) -> RedisPlace:
        return alone


class TestRedisClusterNode(SinkContract):
    @pytest.fixture
    def place(self, node: RedisPlace) -> RedisPlace:
        return node


def write(sink: Sink, shape: TableShape, rows: SinkRows | None) -> None:
    async def scenario() -> None:
        async with opened(sink, shape, partition=2) as writer:
            await writer.apply(rows, held=await writer.read(), moved=at(1))

    asyncio.run(scenario())


def test_layout_is_one_hash_a_row_with_absent_nulls(alone: RedisPlace) -> None:
    shape = shape_of(
        {"country": pl.String(), "vip": pl.Boolean()},
        {"n": pl.Int64(), "x": pl.Float64(), "ok": pl.Boolean(), "at": pl.Datetime("us", "UTC"), "day": pl.Date()},
    )
    time = datetime(2013, 1, 1, tzinfo=UTC)
    write(alone.sink(), shape, changed(shape, {("D:E", True, HOUR_MS): (None, 0.5, False, time, time.date())}))
    assert alone.client.hgetall(f"{{{shape.table}:2}}:D%3AE:1:{HOUR_MS}") == {
        "window_end": str(2 * HOUR_MS), "x": "0.5", "ok": "0", "at": "1356998400000", "day": "2013-01-01",
    }  # fmt: skip
    assert alone.client.hgetall(f"{{{shape.table}:2}}:ledger") == {
        "log_id": "log", "incarnation": "1", "epoch": "1", "hint": "0", "app": "suite",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (pl.String(), "a:b%{}"),
        (pl.String(), None),
        (pl.Int64(), -5),
        (pl.Boolean(), True),
        (pl.Date(), date(2013, 1, 1)),
        (pl.Datetime("ms", "UTC"), datetime(2013, 1, 1, 5, tzinfo=UTC)),
    ],
)
def test_row_key_names_the_row_that_was_written(alone: RedisPlace, dtype: pl.DataType, value: Any) -> None:
    shape = shape_of({"key": dtype})
    write(alone.sink(), shape, changed(shape, {(value, 7): (1, 1.0)}))
    assert alone.client.hget(row_key(shape.table, 2, (value,), 7), "orders") == "1"


def test_a_table_whose_name_has_braces_still_lies_in_one_slot(node: RedisPlace) -> None:
    shape = TableShape("}odd{:%", {"k": pl.String()}, {"n": pl.Int64()}, 4)
    write(node.sink(), shape, changed(shape, {(f"{n}", 0): (n,) for n in range(50)}))
    assert len(node.client.keys("{%7Dodd%7B%3A%25:2}:*")) == 51


def test_a_foreign_key_in_the_way_stops_the_slice_before_its_first_write(alone: RedisPlace) -> None:
    shape = shape_of()
    alone.client.set(row_key(shape.table, 2, ("FR",), 0), "mine")
    with pytest.raises(UserError, match=r"FR:0' that is not a hash"):
        write(alone.sink(), shape, changed(shape, {("DE", 0): (1, 1.0), ("FR", 0): (2, 2.0)}))
    assert alone.client.keys(f"{{{shape.table}:2}}:*") == [row_key(shape.table, 2, ("FR",), 0)]
    with pytest.raises(UserError, match=r"FR:0' that is not a hash"):
        write(alone.sink(), shape, changed(shape, {}, [("FR", 0)]))
    assert alone.client.get(row_key(shape.table, 2, ("FR",), 0)) == "mine"


def test_a_full_server_is_unavailable_and_nothing_is_half_written(alone: RedisPlace) -> None:
    shape, client = shape_of(), alone.client
    rows: dict[Identity, Sequence[object]] = {("DE", 0): (1, 1.0)}
    try:
        client.config_set("maxmemory", 1)
        with pytest.raises(SinkUnavailable, match="maxmemory"):
            write(alone.sink(), shape, changed(shape, rows))
    finally:
        client.config_set("maxmemory", 0)
    assert client.keys(f"{{{shape.table}:2}}:*") == []
    write(alone.sink(), shape, changed(shape, rows))
    assert client.hget(row_key(shape.table, 2, ("DE",), 0), "orders") == "1"


def test_a_server_that_evicts_is_refused(alone: RedisPlace) -> None:
    alone.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(UserError, match=r"allkeys-lru.*Set maxmemory-policy noeviction"):
            write(alone.sink(), shape_of(), None)
    finally:
        alone.client.config_set("maxmemory-policy", "noeviction")


def test_rows_expire_by_event_time(alone: RedisPlace) -> None:
    shape, client = shape_of(), alone.client
    now = int(datetime.now(UTC).timestamp()) * 1000
    rows: dict[Identity, Sequence[object]] = {
        ("new", now): (1, 1.0),
        ("old", 0): (1, 1.0),
        ("before 1970", -(10**12)): (1, 1.0),
    }
    write(redis(alone.server.url, ttl="1d"), shape, changed(shape, rows))
    assert client.pexpiretime(row_key(shape.table, 2, ("new",), now)) == now + HOUR_MS + 24 * HOUR_MS
    assert set(client.keys(f"{{{shape.table}:2}}:*")) == {
        f"{{{shape.table}:2}}:ledger", row_key(shape.table, 2, ("new",), now),
    }  # fmt: skip

    other = shape_of()
    some = changed(other, {("new", now): (1, 1.0)})
    write(alone.sink(), other, SinkRows(some.upserts, some.deletes, expire_at_ms=now + HOUR_MS))
    assert client.pexpiretime(row_key(other.table, 2, ("new",), now)) == now + HOUR_MS
    write(alone.sink(), other, some)
    assert client.pexpiretime(row_key(other.table, 2, ("new",), now)) == -1


def test_a_table_of_another_application_is_refused(alone: RedisPlace) -> None:
    async def scenario() -> None:
        shape = shape_of()
        async with opened(alone.sink(), shape) as writer:
            await writer.apply(None, held=None, moved=at(0))
        other = alone.sink().writer(shape, "another", 0)
        await other.open()
        with pytest.raises(UserError, match="written by application 'suite', not by 'another'"):
            await other.read()
        await other.close()

    asyncio.run(scenario())


def test_scripts_lost_with_a_restart_are_loaded_again(alone: RedisPlace) -> None:
    async def scenario() -> None:
        async with opened(alone.sink(), shape_of()) as writer:
            await writer.apply(None, held=None, moved=at(0))
            alone.client.script_flush()
            await writer.apply(None, held=at(0), moved=at(1))
            assert await writer.read() == at(1)

    asyncio.run(scenario())


def test_works_by_tcp_with_another_database(alone: RedisPlace) -> None:
    shape = shape_of()
    write(redis(alone.server.tcp_url.removesuffix("/0") + "/3"), shape, changed(shape, {("DE", 0): (1, 1.0)}))
    assert Redis.from_url(alone.server.tcp_url.removesuffix("/0") + "/3").dbsize() == 2


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://user:secret@cache.example:7000/2?ssl_ca_data=secret", "redis://cache.example:7000/2"),
        ("rediss://:secret@cache.example", "rediss://cache.example:6379/0"),
        ("unix://:secret@/run/redis.sock?db=1&password=secret", "unix:///run/redis.sock/1"),
    ],
)
def test_the_name_never_shows_a_password(url: str, name: str) -> None:
    assert redis(url).name == name


def test_a_type_that_has_no_text_is_refused_by_name() -> None:
    shape = TableShape("t", {"k": pl.String()}, {"tags": pl.List(pl.String)}, 1)
    with pytest.raises(UserError, match="Column tags of table t"):
        redis("redis://localhost").writer(shape, "app", 0)
