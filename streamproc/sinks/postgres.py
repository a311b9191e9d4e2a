"""Rows as a Postgres table, with the ledger beside it in the same transaction. Postgres 15 or later.

The table has the shape's columns and ``UNIQUE NULLS NOT DISTINCT (keys, window_start)``: a null group key is a value of
its own, which a primary key cannot hold. A table that is there already is used if it can hold the rows; it may have
more columns, if they may be null or have a default. Text is ``text``, integers ``bigint``, floats ``double precision``
(NaN and infinities included), booleans, dates, and times as ``timestamptz``. Text with a NUL character is refused by
Postgres.

One `apply` is one transaction: rows are copied to a temporary table (CSV made by Polars: a fifth of the client time of
asyncpg's binary records), then the ledger is moved by compare-and-set, then rows are upserted and deleted. The copy
comes first because it is the only step that waits for the client: a worker that is stopped in the middle of it holds no
lock. Connections keep temporary tables, so a pooler in between must pool sessions, not transactions.
"""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

from streamproc.core.errors import UserError
from streamproc.sinks.contract import SinkWriter, TableShape

__all__ = ["PostgresSink", "postgres", "public_name"]


def postgres(dsn: str, *, schema: str = "public", table: str | None = None) -> PostgresSink:
    """A sink that keeps a table as a Postgres table.

    ``dsn``: ``postgresql://…``, as asyncpg takes it. ``schema`` must exist. ``table``: the target's name, else the name
    of the table that is sunk. The user needs the right to create tables there, unless both tables exist already.
    """
    with suppress(ImportError):  # `PostgresSink.writer` says what is missing
        import streamproc.sinks.postgres_writer  # noqa: F401  # now, off the way of the first record
    return PostgresSink(dsn, schema, table)


class PostgresSink:
    """See `postgres`."""

    def __init__(self, dsn: str, schema: str, table: str | None) -> None:
        self._dsn, self._schema, self._table = dsn, schema, table
        target = f"{schema}.{table}" if table else schema
        self._name = f"{public_name(dsn)}/{target}"

    @property
    def name(self) -> str:
        return self._name

    def writer(self, shape: TableShape, app_id: str, partition: int) -> SinkWriter:
        try:
            from streamproc.sinks.postgres_writer import PostgresWriter
        except ImportError as error:
            raise UserError(
                f"The sink {self._name} needs the package asyncpg, which is not installed.",
                remedy='Run: pip install "streamproc[postgres]".',
            ) from error
        return PostgresWriter(self._dsn, self._schema, self._table or shape.table, shape, app_id, partition)


def public_name(dsn: str) -> str:
    """The DSN without user, password and options; what no Postgres client could use is refused (and never shown)."""
    remedy = "Write postgresql://user:password@host:5432/database."
    try:
        parts = urlsplit(dsn)
        port = parts.port
    except ValueError:
        raise UserError("The DSN of a Postgres sink has no valid host and port.", remedy=remedy) from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise UserError(f"The DSN of a Postgres sink begins with {parts.scheme or 'no scheme'}://.", remedy=remedy)
    host = parts.hostname or parse_qs(parts.query).get("host", [""])[0]
    return f"postgresql://{host}{f':{port}' if port else ''}{parts.path}"
