"""What writes a table to Postgres: see `sinks.postgres` for the layout and the order of steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import polars as pl

from streamproc.commit.ledger import Ledger
from streamproc.core import limits
from streamproc.core.errors import LedgerMoved, invariant
from streamproc.sinks.contract import SinkRows, TableShape
from streamproc.sinks.feed import check_rows
from streamproc.sinks.postgres import public_name
from streamproc.sinks.postgres_pool import Pool, Session, quoted
from streamproc.sinks.postgres_target import LEDGER_TABLE, column_types, prepare
from streamproc.sinks.shared import Shared

__all__ = ["PostgresWriter"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class PostgresWriter:
    """One table and task in Postgres. See `contract.SinkWriter`."""

    def __init__(self, dsn: str, schema: str, table: str, shape: TableShape, app_id: str, partition: int) -> None:
        self._dsn, self._schema, self._table, self._shape = dsn, schema, table, shape
        self._owner = (app_id, table, partition)
        self._types = column_types(shape)
        self._sql = _Statements(schema, table, shape)
        self._pool: Pool | None = None

    async def open(self) -> None:
        first = self._pool is None
        if self._pool is None:
            self._pool = _pools.acquire(self._dsn)
        try:
            async with self._pool.session() as session:
                await prepare(session, self._schema, self._table, self._shape)
        except BaseException:  # whatever it was, a writer that never opened must not keep connections from closing
            if first:
                await self.close()
            raise

    async def close(self) -> None:
        if self._pool is not None:
            self._pool = None
            await _pools.release(self._dsn)

    async def read(self) -> Ledger | None:
        async with self._connected().session() as session:
            found = await session.connection.fetchrow(self._sql.read, *self._owner)
        return None if found is None else Ledger(*found)

    async def apply(self, rows: SinkRows | None, *, held: Ledger | None, moved: Ledger) -> None:
        async with self._connected().session() as session, session.transaction():
            if rows is not None:
                check_rows(rows, self._shape)
                await self._copy(session, rows.upserts, self._shape.names)
                await self._copy(session, rows.deletes, self._shape.identity)
            await self._move(session, held, moved)
            if rows is not None and not rows.upserts.is_empty():
                await session.connection.execute(self._sql.upsert(session.staging(self._staged(self._shape.names))))
            if rows is not None:
                await self._delete(session, rows.deletes)

    async def prune(
        self,
        live: Collection[tuple[object, ...]],
        *,
        since_ms: int,
        mine: Callable[[tuple[object, ...]], bool],
        held: Ledger,
    ) -> int:
        keep = live if isinstance(live, (set, frozenset)) else set(live)
        async with self._connected().session() as session, session.transaction():
            found = await session.connection.fetchrow(self._sql.read + " FOR UPDATE", *self._owner)
            self._check(None if found is None else Ledger(*found), held)
            doomed: list[tuple[object, ...]] = []
            cursor = await session.connection.cursor(self._sql.list_rows, _EPOCH + timedelta(milliseconds=since_ms))
            while page := await cursor.fetch(limits.POSTGRES_READ_ROWS_MAX):
                for record in page:
                    *key, start = record
                    if (*key, (start - _EPOCH) // timedelta(milliseconds=1)) not in keep and mine(tuple(key)):
                        doomed.append(tuple(record))
            schema = self._shape.keys | {"window_start": pl.Datetime("us", "UTC")}
            rows = pl.DataFrame(doomed, schema=schema, orient="row")
            await self._copy(session, rows, self._shape.identity)
            return await self._delete(session, rows)

    async def forget(self) -> bool:
        async with self._connected().session() as session:
            status = await session.connection.execute(self._sql.forget, *self._owner)
        return bool(status.endswith(" 1"))

    async def _move(self, session: Session, held: Ledger | None, moved: Ledger) -> None:
        """Compare, lock and move in one statement; a second writer waits here and then finds the ledger moved."""
        values = (moved.log_id, moved.incarnation, moved.epoch, moved.hint)
        if held is None:
            status = await session.connection.execute(self._sql.create, *self._owner, *values)
        else:
            status = await session.connection.execute(
                self._sql.move, *self._owner, *values, held.log_id, held.incarnation, held.epoch
            )
        if not status.endswith(" 1"):
            raise self._moved(held)

    def _check(self, found: Ledger | None, held: Ledger) -> None:
        if not held.same(found):
            raise self._moved(held)

    def _moved(self, held: Ledger | None) -> LedgerMoved:
        return LedgerMoved(
            f"The ledger of {self._owner} in {LEDGER_TABLE} of {public_name(self._dsn)} is not where this task "
            f"left it ({held})."
        )

    async def _copy(self, session: Session, frame: pl.DataFrame, columns: list[str]) -> None:
        """Rows into this connection's temporary table, which empties itself at the end of the transaction."""
        if frame.is_empty():
            return
        staging = await session.stage(self._staged(columns))
        for part in frame.select(columns).iter_slices(limits.POSTGRES_COPY_ROWS):  # each with a time-out of its own
            text = part.write_csv(include_header=False, quote_style="non_numeric").encode()
            # One buffer, which asyncpg takes although its types do not say so: between two pieces of a file it waits
            # without any time-out, and for ever if the connection dies there. (Plain bytes it takes for a path.)
            block: Any = memoryview(text)
            await session.connection.copy_to_table(staging, source=block, columns=columns, format="csv", null="")

    def _staged(self, columns: list[str]) -> str:
        return ", ".join(f"{quoted(name)} {self._types[name]}" for name in columns)

    async def _delete(self, session: Session, frame: pl.DataFrame) -> int:
        """Delete what was copied. One statement per pattern of null keys: only plain equality can use the index."""
        if frame.is_empty():
            return 0
        staging = session.staging(self._staged(self._shape.identity))
        deleted = 0
        patterns = frame.select(pl.col(name).is_null() for name in self._shape.keys).unique().rows() or [()]
        for pattern in patterns:
            status = await session.connection.execute(self._sql.delete(staging, pattern))
            deleted += int(status.rsplit(" ", 1)[1])
        return deleted

    def _connected(self) -> Pool:
        invariant(self._pool is not None, f"The writer to {self._owner} was used before open() or after close().")
        assert self._pool is not None
        return self._pool


class _Statements:
    """SQL of one target."""

    def __init__(self, schema: str, table: str, shape: TableShape) -> None:
        self._target, self._shape = f"{quoted(schema)}.{quoted(table)}", shape
        ledger = f"{quoted(schema)}.{quoted(LEDGER_TABLE)}"
        mine = "app = $1 AND sink = $2 AND partition = $3"
        self.read = f"SELECT log_id, incarnation, epoch, hint FROM {ledger} WHERE {mine}"
        self.create = f"INSERT INTO {ledger} VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING"
        self.move = (
            f"UPDATE {ledger} SET log_id = $4, incarnation = $5, epoch = $6, hint = $7 "
            f"WHERE {mine} AND log_id = $8 AND incarnation = $9 AND epoch = $10"
        )
        self.forget = f"DELETE FROM {ledger} WHERE {mine}"
        self.list_rows = f"SELECT {_columns(shape.identity)} FROM {self._target} WHERE window_start >= $1"

    def upsert(self, staging: str) -> str:
        names = self._shape.names
        absolute = ", ".join(f"{quoted(n)} = EXCLUDED.{quoted(n)}" for n in names if n not in self._shape.identity)
        return (
            f"INSERT INTO {self._target} ({_columns(names)}) SELECT {_columns(names)} FROM {quoted(staging)} "
            f"ON CONFLICT ({_columns(self._shape.identity)}) DO UPDATE SET {absolute}"
        )

    def delete(self, staging: str, null_keys: tuple[Any, ...]) -> str:
        tests = ["t.window_start = d.window_start"]
        for name, null in zip(self._shape.keys, null_keys, strict=True):
            column = quoted(name)
            tests.append(f"t.{column} IS NULL AND d.{column} IS NULL" if null else f"t.{column} = d.{column}")
        return f"DELETE FROM {self._target} t USING {quoted(staging)} d WHERE {' AND '.join(tests)}"


def _columns(names: list[str]) -> str:
    return ", ".join(quoted(name) for name in names)


async def _close(pool: Pool) -> None:
    await pool.close()


_pools: Final = Shared(lambda dsn: Pool(dsn, public_name(dsn)), _close)
