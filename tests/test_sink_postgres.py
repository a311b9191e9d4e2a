"""The Postgres sink on a real server: the sinks' contract, and what is Postgres's own."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import polars as pl
import pytest

pytest.register_assert_rewrite("contract.sink_suite")
from contract.sink_suite import Identity, Row, SinkContract, at, changed, expected, opened, shape_of  # noqa: E402

from streamproc.core import limits  # noqa: E402
from streamproc.core.errors import LedgerMoved, SinkUnavailable, UserError  # noqa: E402
from streamproc.sinks.contract import Sink, SinkRows, SinkWriter, TableShape  # noqa: E402
from streamproc.sinks.postgres import postgres  # noqa: E402
from streamproc.sinks.postgres_pool import Pool  # noqa: E402
from streamproc.testing.servers import Cable, EmbeddedPostgres  # noqa: E402

pytestmark = pytest.mark.server
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class PostgresPlace:
    """`contract.sink_suite.SinkPlace` on one server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.server = EmbeddedPostgres(folder / "data").start()
        self.sql(
            'CREATE ROLE guest LOGIN; CREATE ROLE shut NOLOGIN; CREATE SCHEMA "odd schema"; '
            "CREATE SCHEMA closed; GRANT USAGE ON SCHEMA closed TO guest"
        )

    def sql(self, *statements: str) -> list[tuple[object, ...]]:
        """Run statements over a connection of their own; the rows of the last one."""

        async def run() -> list[tuple[object, ...]]:
            connection = await asyncpg.connect(self.server.dsn)
            for statement in statements[:-1]:
                await connection.execute(statement)
            last = statements[-1]
            rows = await connection.fetch(last) if last.startswith("SELECT") else [await connection.execute(last)][:0]
            await connection.close()
            return [tuple(row) for row in rows]

        return asyncio.run(run())

    def dsn(self, user: str = "postgres", database: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.server.socket_folder}"

    def sink(self) -> Sink:
        return postgres(self.server.dsn)

    def wrong(self) -> Sequence[Callable[[], Sink]]:
        return [
            lambda: postgres("mysql://user:secret@localhost/app"),
            lambda: postgres("localhost/app"),
            lambda: postgres("postgresql://user:secret@localhost:port/app"),
            lambda: postgres("postgresql://user:x@secret:y@localhost:1/app?port=secret"),
            lambda: postgres(self.dsn(user="nobody:secret")),
            lambda: postgres(self.dsn(user="shut:secret")),
            lambda: postgres(self.dsn(database="nowhere")),
            lambda: postgres(self.dsn(), schema="nowhere"),
            lambda: postgres(self.dsn(user="guest"), schema="closed"),
        ]

    async def rows(self, shape: TableShape) -> dict[Identity, Row]:
        connection = await asyncpg.connect(self.server.dsn)
        records = await connection.fetch(f"SELECT * FROM {shape.table}")
        await connection.close()
        rows: dict[Identity, Row] = {}
        for record in records:
            values = {name: _plain(value) for name, value in record.items()}
            rows[tuple(values.pop(name) for name in shape.identity)] = values
        return rows

    @asynccontextmanager
    async def flaky(self) -> AsyncIterator[PostgresFlaky]:
        own = self._folder / ".s.PGSQL.5432"
        async with Cable(self.server.socket_folder / own.name, own) as cable:
            yield PostgresFlaky(cable)

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.restart()


class PostgresFlaky:
    def __init__(self, cable: Cable) -> None:
        self.sink, self._cable = postgres(f"postgresql://postgres@/postgres?host={cable.path.parent}"), cable

    def break_midway(self) -> None:
        self._cable.cut_after(600_000)

    def mend(self) -> None:
        self._cable.mend()


def _plain(value: object) -> object:
    return (value - EPOCH) // timedelta(milliseconds=1) if isinstance(value, datetime) else value


@pytest.fixture(scope="module")
def place() -> Iterator[PostgresPlace]:
    # Not in pytest's own folder: each pytest run closes that to other users, and Postgres, if started by root, is one.
    with tempfile.TemporaryDirectory(prefix="streamproc-") as folder:
        place = PostgresPlace(Path(folder))
        yield place
        place.server.stop()


class TestPostgres(SinkContract):
    pass


def write(sink: Sink, shape: TableShape, rows: SinkRows | None = None) -> None:
    async def scenario() -> None:
        async with opened(sink, shape) as writer:
            await writer.apply(rows, held=await writer.read(), moved=at(1))

    asyncio.run(scenario())


ONE: dict[Identity, Sequence[object]] = {("DE", 0): (1, 1.0)}


def test_makes_a_table_of_the_shape_with_its_identity_unique(place: PostgresPlace) -> None:
    shape = shape_of(
        {"country": pl.String(), "vip": pl.Boolean()}, {"n": pl.UInt32(), "x": pl.Float64(), "day": pl.Date()}
    )
    write(place.sink(), shape)
    columns = place.sql(
        f"SELECT column_name, data_type FROM information_schema.columns WHERE table_name = '{shape.table}' ORDER BY "
        "ordinal_position"
    )
    assert columns == [
        ("country", "text"),
        ("vip", "boolean"),
        ("window_start", "timestamp with time zone"),
        ("window_end", "timestamp with time zone"),
        ("n", "bigint"),
        ("x", "double precision"),
        ("day", "date"),
    ]
    ((index,),) = place.sql(f"SELECT indexdef FROM pg_indexes WHERE tablename = '{shape.table}'")
    assert "UNIQUE" in str(index)
    assert "(country, vip, window_start) NULLS NOT DISTINCT" in str(index)


def test_the_ledger_is_one_row_a_task(place: PostgresPlace) -> None:
    shape = shape_of()
    write(place.sink(), shape)
    found = place.sql(f"SELECT * FROM streamproc_ledger WHERE sink = '{shape.table}'")
    assert found == [("suite", shape.table, 0, "log", 1, 1, 0)]


def test_names_with_quotes_and_a_schema_of_the_users(place: PostgresPlace) -> None:
    shape = TableShape('Rev"enue', {"the key": pl.String()}, {'n"': pl.Int64(), "select": pl.Int64()}, 1)
    sink = postgres(place.dsn(), schema="odd schema", table='My "table')
    write(sink, shape, changed(shape, {("DE", 0): (1, 2), (None, 0): (3, 4)}, [("FR", 0)]))
    rows = place.sql('SELECT "the key", "n""", "select" FROM "odd schema"."My ""table" ORDER BY 2')
    assert rows == [("DE", 1, 2), (None, 3, 4)]


TABLES_THAT_DO = {
    "as we would make it": "(country text, window_start timestamptz, window_end timestamptz, orders bigint, "
    "revenue float8, UNIQUE NULLS NOT DISTINCT (country, window_start))",
    "a primary key over the identity, columns in another order": "(orders bigint, revenue float8, "
    "window_end timestamptz, window_start timestamptz, country text, PRIMARY KEY (window_start, country))",
    "more columns that may stay empty": "(id bigserial PRIMARY KEY, country text, window_start timestamptz, window_end "
    "timestamptz, orders bigint, revenue float8, note text, seen timestamptz NOT NULL DEFAULT now(), "
    "UNIQUE NULLS NOT DISTINCT (country, window_start))",
    "an index with further columns in it": "(country text NOT NULL, window_start timestamptz, window_end "
    "timestamptz, orders bigint, revenue float8, UNIQUE NULLS NOT DISTINCT (country, window_start) INCLUDE (orders))",
}


@pytest.mark.parametrize("name", TABLES_THAT_DO)
def test_a_table_that_is_there_and_fits_is_used(place: PostgresPlace, name: str) -> None:
    shape = shape_of()
    place.sql(f"CREATE TABLE {shape.table} {TABLES_THAT_DO[name]}")
    write(place.sink(), shape, changed(shape, ONE))
    assert place.sql(f"SELECT country, orders FROM {shape.table}") == [("DE", 1)]


_BODY = "country text, window_start timestamptz, window_end timestamptz, revenue float8"
_UNIQUE = "UNIQUE NULLS NOT DISTINCT (country, window_start)"
TABLES_THAT_DO_NOT = {
    "column missing": (f"({_BODY}, {_UNIQUE})", 'no column orders, .*bigint.*ADD COLUMN "orders" bigint'),
    "other type": (f"({_BODY}, orders integer, {_UNIQUE})", "Column orders .* is integer, but .* needs bigint"),
    "time without zone": (
        f"(country text, window_start timestamp, window_end timestamptz, orders bigint, revenue float8, {_UNIQUE})",
        "Column window_start .* is timestamp without time zone, but .* needs timestamp with time zone",
    ),
    "a column nobody fills": (f"({_BODY}, orders bigint, boss text NOT NULL, {_UNIQUE})", "Column boss .* not be null"),
    "nothing unique": (f"({_BODY}, orders bigint)", r"not unique by \(country, window_start\)"),
    "unique by less": (
        f"({_BODY}, orders bigint, PRIMARY KEY (country))",
        r"unique by \(country\), which is less than .* \(country, window_start\)",
    ),
    "unique by less besides": (f"({_BODY}, orders bigint UNIQUE, UNIQUE (window_start), {_UNIQUE})", "which is less"),
    "unique by more": (f"({_BODY}, orders bigint, UNIQUE (country, window_start, orders))", "not unique by"),
    "unique in part": (
        f"({_BODY}, orders bigint); CREATE UNIQUE INDEX ON %s (country, window_start) WHERE orders > 0",
        "not unique by",
    ),
    "checked too late": (f"({_BODY}, orders bigint, {_UNIQUE} DEFERRABLE)", "not unique by"),
    "nulls distinct": (
        f"({_BODY}, orders bigint, UNIQUE (country, window_start))",
        "rows with a null key as different",
    ),
}


@pytest.mark.parametrize("name", TABLES_THAT_DO_NOT)
def test_a_table_that_cannot_hold_the_rows_is_refused_with_the_remedy(place: PostgresPlace, name: str) -> None:
    shape = shape_of()
    definition, says = TABLES_THAT_DO_NOT[name]
    place.sql(f"CREATE TABLE {shape.table} {definition.replace('%s', shape.table)}")
    with pytest.raises(UserError, match=says) as caught:
        write(place.sink(), shape)
    assert "TABLE" in caught.value.remedy


def test_a_value_postgres_cannot_hold_is_the_users_error_and_nothing_of_the_epoch_is_written(
    place: PostgresPlace,
) -> None:
    shape = shape_of(columns={"n": pl.UInt64()})
    for rows in ({("DE", 0): (1,), ("a\0b", 0): (1,)}, {("DE", 0): (1,), ("FR", 0): (2**64 - 1,)}):
        with pytest.raises(UserError, match="Postgres cannot hold this value"):
            write(place.sink(), shape, changed(shape, rows))
    assert place.sql(f"SELECT * FROM {shape.table}") == []
    assert place.sql(f"SELECT * FROM streamproc_ledger WHERE sink = '{shape.table}'") == []


def test_a_null_key_in_a_table_that_forbids_it_is_the_users_error(place: PostgresPlace) -> None:
    shape = shape_of()
    place.sql(f"CREATE TABLE {shape.table} ({_BODY}, orders bigint, PRIMARY KEY (country, window_start))")
    with pytest.raises(UserError, match="null value in column"):
        write(place.sink(), shape, changed(shape, {(None, 0): (1, 1.0)}))


def test_a_user_without_the_right_to_create_may_write_to_tables_made_for_it(place: PostgresPlace) -> None:
    shape = shape_of()
    write(postgres(place.dsn(), schema="closed"), shape)
    place.sql("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA closed TO guest")

    async def scenario() -> None:
        async with opened(postgres(place.dsn(user="guest"), schema="closed"), shape) as writer:
            await writer.apply(changed(shape, ONE), held=at(1), moved=at(2))

    asyncio.run(scenario())
    assert place.sql(f"SELECT orders FROM closed.{shape.table}") == [(1,)]


def test_tasks_of_a_worker_share_a_bounded_number_of_connections(place: PostgresPlace) -> None:
    async def scenario() -> None:
        shapes = [shape_of() for _ in range(3)]
        writers = [place.sink().writer(shape, "suite", p) for shape in shapes for p in range(4)]
        for writer in writers:
            await writer.open()
        await asyncio.gather(*(w.apply(None, held=None, moved=at(0)) for w in writers))
        looker = await asyncpg.connect(place.server.dsn)
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'streamproc'"

        async def down_to(most: int) -> int:
            """Sessions, once there are no more than this: a closed one is listed a moment longer."""
            while (sessions := int(await looker.fetchval(count))) > most:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.01)
            return sessions

        assert await down_to(limits.SINK_CONNECTIONS_MAX) >= 1
        for writer in writers:
            await writer.close()
        assert await down_to(0) == 0
        await looker.close()

    asyncio.run(scenario())


def test_a_cancelled_apply_leaves_no_half_open_transaction(place: PostgresPlace) -> None:
    async def scenario() -> None:
        shape = shape_of()
        async with opened(place.sink(), shape) as writer:
            rows = {(f"{n}", 0): (1, 1.0) for n in range(20_000)}
            apply = asyncio.create_task(writer.apply(changed(shape, rows), held=None, moved=at(1)))
            await asyncio.sleep(0.05)
            apply.cancel()
            with pytest.raises(asyncio.CancelledError):
                await apply
            assert await writer.read() is None
            await writer.apply(changed(shape, ONE), held=None, moved=at(1))
            assert await place.rows(shape) == expected(shape, ONE)

    asyncio.run(scenario())


def test_a_worker_stopped_inside_its_transaction_does_not_hold_the_ledger_for_ever(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(limits, "SINK_TIMEOUT_S", 0.5)
        shape = shape_of()
        stopped = Pool(place.server.dsn, "the stopped worker")

        async def stop_inside_a_transaction(writer: SinkWriter) -> None:
            async with stopped.session() as session, session.transaction():
                await session.connection.execute(f"UPDATE streamproc_ledger SET epoch = 7 WHERE sink = '{shape.table}'")
                for _ in range(20):
                    try:
                        await writer.apply(None, held=at(1), moved=at(1, incarnation=2))
                        break
                    except SinkUnavailable:  # until the server ends the session that stands still
                        continue
                await session.connection.execute("SELECT 1")

        async with opened(place.sink(), shape) as next_owner:
            await next_owner.apply(None, held=None, moved=at(1))
            with pytest.raises(SinkUnavailable):
                await stop_inside_a_transaction(next_owner)
            assert await next_owner.read() == at(1, incarnation=2)
            with pytest.raises(LedgerMoved):
                await next_owner.apply(None, held=at(1), moved=at(2))
        await stopped.close()

    asyncio.run(scenario())


def test_a_table_altered_while_running_costs_one_retry(place: PostgresPlace) -> None:
    async def scenario() -> None:
        shape = shape_of()
        async with opened(place.sink(), shape) as writer:
            await writer.apply(changed(shape, ONE), held=None, moved=at(1))
            await asyncio.to_thread(place.sql, f"ALTER TABLE {shape.table} ADD COLUMN note text")
            try:
                await writer.apply(changed(shape, ONE), held=at(1), moved=at(2))
            except SinkUnavailable:
                await writer.apply(changed(shape, ONE), held=at(1), moved=at(2))
            await asyncio.to_thread(place.sql, f"ALTER TABLE {shape.table} DROP COLUMN orders")
            with pytest.raises(UserError, match="orders"):
                await writer.apply(changed(shape, ONE), held=at(2), moved=at(3))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("dsn", "name"),
    [
        ("postgresql://user:secret@db.example:7000/app?password=secret", "postgresql://db.example:7000/app/public.t"),
        ("postgres://db.example", "postgresql://db.example/public.t"),
        ("postgresql://user:secret@/app?host=/run/postgresql", "postgresql:///run/postgresql/app/public.t"),
    ],
)
def test_the_name_never_shows_a_password(dsn: str, name: str) -> None:
    assert postgres(dsn, table="t").name == name


def test_a_type_that_has_no_column_is_refused_by_name() -> None:
    shape = TableShape("t", {"k": pl.String()}, {"tags": pl.List(pl.String)}, 1)
    with pytest.raises(UserError, match="Column tags of table t"):
        postgres("postgresql://localhost/app").writer(shape, "app", 0)
