"""The tables of a Postgres sink: made if missing, else held against what the rows need before the first one is
written."""

from __future__ import annotations

from typing import Final

import polars as pl

from streamproc.core.errors import UserError
from streamproc.sinks.contract import TableShape
from streamproc.sinks.postgres_pool import Session, quoted

__all__ = ["LEDGER_TABLE", "column_types", "prepare"]

LEDGER_TABLE: Final = "streamproc_ledger"
_POSTGRES_MIN: Final = 150_000
_LOCK_SPACE: Final = 0x5350
"""First half of the advisory lock's key ("SP")."""
_LEDGER_COLUMNS: Final = (
    "app text, sink text, partition integer, log_id text NOT NULL, incarnation bigint NOT NULL, epoch bigint NOT NULL, "
    "hint bigint NOT NULL, PRIMARY KEY (app, sink, partition)"
)


def column_types(shape: TableShape) -> dict[str, str]:
    """Postgres's type for each column of a row, in order. `UserError` for a type that Postgres rows cannot hold."""
    times = {"window_start": "timestamp with time zone", "window_end": "timestamp with time zone"}
    types = {name: _type(shape, name, dtype) for name, dtype in (shape.keys | shape.columns).items()} | times
    return {name: types[name] for name in shape.names}


async def prepare(session: Session, schema: str, table: str, shape: TableShape) -> None:
    """Make what is missing and check what is there. Tasks that do this at the same time wait for each other: two
    `CREATE TABLE IF NOT EXISTS` at once may both find nothing and one of them fail."""
    version = int(await session.connection.fetchval("SHOW server_version_num"))
    if version < _POSTGRES_MIN:
        raise UserError(
            f"The server is Postgres {version // 10_000}, which has no UNIQUE NULLS NOT DISTINCT.",
            remedy="Use Postgres 15 or later.",
        )
    async with session.transaction():
        await session.connection.execute(
            "SELECT pg_advisory_xact_lock($1, hashtext($2))", _LOCK_SPACE, f"{schema}.{LEDGER_TABLE}"
        )
        for name, definition in ((LEDGER_TABLE, _LEDGER_COLUMNS), (table, _definition(shape))):
            # Looked up first: IF NOT EXISTS asks for the right to create even when there is nothing to do.
            if await session.connection.fetchval("SELECT to_regclass($1)", _target(schema, name)) is None:
                await session.connection.execute(f"CREATE TABLE {_target(schema, name)} ({definition})")
    await _check_columns(session, schema, table, shape)
    await _check_unique(session, schema, table, shape)


def _type(shape: TableShape, name: str, dtype: pl.DataType) -> str:
    if dtype.is_integer():
        return "bigint"
    if dtype.is_float():
        return "double precision"
    if isinstance(dtype, pl.Datetime):
        return "timestamp with time zone"
    simple = {pl.String: "text", pl.Boolean: "boolean", pl.Date: "date"}
    for kind, found in simple.items():
        if dtype == kind:
            return found
    raise UserError(
        f"Column {name} of table {shape.table} is of type {dtype}, which the Postgres sink cannot hold.",
        remedy="Make it text, an integer, a float, a boolean, a date or a time with with_columns() before .table().",
    )


def _target(schema: str, table: str) -> str:
    return f"{quoted(schema)}.{quoted(table)}"


def _definition(shape: TableShape) -> str:
    required = ("window_start", "window_end")
    columns = [
        f"{quoted(name)} {kind}{' NOT NULL' if name in required else ''}" for name, kind in column_types(shape).items()
    ]
    return ", ".join([*columns, f"UNIQUE NULLS NOT DISTINCT ({', '.join(quoted(n) for n in shape.identity)})"])


async def _check_columns(session: Session, schema: str, table: str, shape: TableShape) -> None:
    found = {
        name: (kind, fillable)
        for name, kind, fillable in await session.connection.fetch(
            "SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull OR atthasdef OR attidentity <> '' "
            "FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
            _target(schema, table),
        )
    }
    where, alter = f"Postgres table {schema}.{table}", f"ALTER TABLE {_target(schema, table)}"
    for name, kind in column_types(shape).items():
        if name not in found:
            raise UserError(
                f"{where} has no column {name}, which table {shape.table} needs ({kind}).",
                remedy=f"{alter} ADD COLUMN {quoted(name)} {kind}; or sink into a new table.",
            )
        if found[name][0] != kind:
            raise UserError(
                f"Column {name} of {where} is {found[name][0]}, but table {shape.table} needs {kind}.",
                remedy=f"{alter} ALTER COLUMN {quoted(name)} TYPE {kind}; or sink into a new table.",
            )
    for name, (_, fillable) in found.items():
        if name not in shape.names and not fillable:
            raise UserError(
                f"Column {name} of {where} must not be null and has no default, but {shape.table} does not fill it.",
                remedy=f"{alter} ALTER COLUMN {quoted(name)} DROP NOT NULL; or sink into a new table.",
            )


async def _check_unique(session: Session, schema: str, table: str, shape: TableShape) -> None:
    """Exactly the identity must be unique: fewer columns would refuse right rows, none would double them."""
    indexes = await session.connection.fetch(
        "SELECT i.indnullsnotdistinct OR bool_and(a.attnotnull) AS total, "
        "       i.indisvalid AND i.indimmediate AND i.indpred IS NULL AS usable, array_agg(a.attname::text) AS columns "
        "FROM pg_index i "
        "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts-1]) "
        "WHERE i.indrelid = to_regclass($1) AND i.indisunique AND i.indexprs IS NULL GROUP BY i.indexrelid, "
        "      i.indnullsnotdistinct, i.indisvalid, i.indimmediate, i.indpred",
        _target(schema, table),
    )
    identity = set(shape.identity)
    where = f"Postgres table {schema}.{table}"
    columns = ", ".join(quoted(name) for name in shape.identity)
    remedy = (
        f"ALTER TABLE {_target(schema, table)} ADD UNIQUE NULLS NOT DISTINCT ({columns}); or sink into a new table."
    )
    for index in indexes:
        if set(index["columns"]) < identity:
            raise UserError(
                f"{where} is unique by ({', '.join(index['columns'])}), which is less than what identifies a row of "
                f"table {shape.table} ({', '.join(shape.identity)}): different rows would overwrite each other.",
                remedy=f"Drop that constraint, then: {remedy}",
            )
    matching = [index for index in indexes if set(index["columns"]) == identity and index["usable"]]
    if not matching:
        raise UserError(f"{where} is not unique by ({', '.join(shape.identity)}).", remedy=remedy)
    if not any(index["total"] for index in matching):
        raise UserError(f"{where} counts rows with a null key as different from each other.", remedy=remedy)
