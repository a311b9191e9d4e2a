"""A few connections to one Postgres, shared by all tasks of a worker, and asyncpg's exceptions by consequence."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
from asyncpg import exceptions as px

from streamproc.core import limits
from streamproc.core.errors import LedgerMoved, SinkUnavailable, UserError

if TYPE_CHECKING:
    from asyncpg.transaction import Transaction

    Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

__all__ = ["Pool", "Session", "quoted"]


def quoted(name: str) -> str:
    """An SQL identifier, whatever characters it has."""
    return '"' + name.replace('"', '""') + '"'


class Session:
    """One connection and the temporary tables it has."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._staged: set[str] = set()

    def transaction(self) -> Transaction:
        """READ COMMITTED whatever the server's default: the ledger's compare-and-set rests on its waiting for a row
        lock and then looking at the row anew."""
        return self.connection.transaction(isolation="read_committed")

    def staging(self, columns: str) -> str:
        """Name of the temporary table with these column definitions; equal definitions share one."""
        return "streamproc_" + hashlib.blake2b(columns.encode(), digest_size=8).hexdigest()

    async def stage(self, columns: str) -> str:
        """The same, made on first use. It empties itself at every commit."""
        name = self.staging(columns)
        if name not in self._staged:
            await self.connection.execute(
                f"CREATE TEMPORARY TABLE IF NOT EXISTS {quoted(name)} ({columns}) ON COMMIT DELETE ROWS"
            )
            self._staged.add(name)
        return name

    def forget_staged(self) -> None:
        """After a rollback: tables made in that transaction are gone, older ones are not; the next `stage` finds
        out."""
        self._staged.clear()


class Pool:
    """At most `limits.SINK_CONNECTIONS_MAX` connections, made when needed; one that failed is dropped, never used
    again.

    A session's server ends it when it idles inside a transaction, so that a worker that was stopped there does not hold
    a ledger's lock against its successor.
    """

    def __init__(self, dsn: str, name: str) -> None:
        self._dsn, self._name = dsn, name
        self._idle: list[Session] = []
        self._slots = asyncio.Semaphore(limits.SINK_CONNECTIONS_MAX)
        self._closed = False

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A connection for one call. Leaving by anything but success or `LedgerMoved` terminates it: after a time-out
        or a cancellation nobody knows what it is doing."""
        async with self._slots:
            with failures(self._name):
                session = await self._take()
                usable = False
                try:
                    yield session
                    usable = True
                except LedgerMoved:
                    session.forget_staged()
                    usable = True
                    raise
                finally:
                    if usable and not self._closed and not session.connection.is_closed():
                        self._idle.append(session)
                    else:
                        session.connection.terminate()

    async def close(self) -> None:
        """Close what is idle, and what is under way when it ends."""
        self._closed = True
        while self._idle:
            connection = self._idle.pop().connection
            try:
                await connection.close(timeout=limits.SINK_TIMEOUT_S)
            except (px.PostgresError, px.InterfaceError, OSError, TimeoutError):
                connection.terminate()

    async def _take(self) -> Session:
        while self._idle:
            session = self._idle.pop()
            if not session.connection.is_closed():
                return session
        wait_ms = str(int(limits.SINK_TIMEOUT_S * 1000))
        settings = {
            "application_name": "streamproc",
            "idle_in_transaction_session_timeout": wait_ms,
            "lock_timeout": wait_ms,
        }
        try:
            connection = await asyncpg.connect(
                self._dsn,
                timeout=limits.SINK_TIMEOUT_S,
                command_timeout=limits.SINK_TIMEOUT_S,
                server_settings=settings,
            )
        except (px.ClientConfigurationError, ValueError):
            # What asyncpg says of a DSN may hold a piece of the password: it is not shown, nor chained.
            raise UserError(f"The DSN of {self._name} is not usable.", remedy="Check it with psql.") from None
        return Session(connection)


_NOT_NOW_CLASSES = ("08", "25", "40", "53", "55", "57", "58", "XX")
"""Connection, read-only standby, serialization, resources, locks, operator's intervention, system, internal error."""
_STALE_PLAN = "0A000"
"""Somebody altered the table under a cached statement; a new connection plans anew."""


@contextmanager
def failures(name: str) -> Iterator[None]:
    """asyncpg's exceptions by consequence."""
    try:
        yield
    except px.PostgresError as error:
        state = error.sqlstate or "XX000"
        if state[:2] in _NOT_NOW_CLASSES or state == _STALE_PLAN:
            raise SinkUnavailable(f"{name} cannot write now: {error} ({state}).") from error
        raise UserError(f"{name} refuses: {error} ({state}).", remedy=_remedy(state)) from error
    except (px.InterfaceError, px.InternalClientError, OSError, TimeoutError) as error:
        raise SinkUnavailable(f"{name} does not answer: {error or type(error).__name__}.") from error


def _remedy(state: str) -> str:
    if state[:2] == "28":
        return "Check user and password in the DSN, and the server's pg_hba.conf."
    if state[:2] == "3D":
        return "Create the database, or correct its name in the DSN."
    if state[:2] == "3F":
        return "Create the schema, or give another one with schema=…."
    if state == "42501":
        return "Grant the user the right to create and write the table, or create it beforehand."
    if state[:2] == "22":
        return "Postgres cannot hold this value: filter or change it with with_columns() before .table()."
    if state[:2] == "23":
        return "Remove the constraint, or sink into a table of its own."
    return "Compare the table with what the sink's page in the documentation asks for, or sink into a new table."
