"""The SQLite file under the embedded log: opening, locking, atomic writes, and what its failures mean."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from streamproc.core.errors import BrokerUnavailable, StreamprocError, UserError

__all__ = ["LogFile", "Synchronous"]

Synchronous = Literal["FULL", "NORMAL"]
"""FULL: a commit survives a power cut. NORMAL: it survives the death of the process, not of the machine."""

_APPLICATION_ID: Final = 0x73746C67
_SCHEMA_VERSION: Final = 1
_PAGE_BYTES: Final = 8192
_WAL_BYTES_MAX: Final = 64 << 20
"""The write-ahead log is cut back to this after a large commit."""
_NOT_OURS: Final = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
_LOCKED: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SCHEMA: Final = """
CREATE TABLE topics (name TEXT PRIMARY KEY, partitions INTEGER NOT NULL, config TEXT NOT NULL);
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, partition INTEGER NOT NULL,
    begin INTEGER NOT NULL, next INTEGER NOT NULL, cleaned INTEGER NOT NULL, UNIQUE (topic, partition));
CREATE TABLE batches (
    partition_id INTEGER NOT NULL, last_offset INTEGER NOT NULL, base_offset INTEGER NOT NULL,
    producer_id INTEGER NOT NULL, transactional INTEGER NOT NULL, control INTEGER NOT NULL,
    written_ms INTEGER NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (partition_id, last_offset));
CREATE TABLE group_offsets (
    name TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL, position INTEGER NOT NULL,
    PRIMARY KEY (name, topic, partition)) WITHOUT ROWID;
CREATE TABLE producers (
    transactional_id TEXT PRIMARY KEY, producer_id INTEGER NOT NULL UNIQUE, epoch INTEGER NOT NULL) WITHOUT ROWID;
"""


class LogFile:
    """One SQLite file, held by one process at a time. Every write is one `write()` block: all of it or nothing."""

    def __init__(self, path: Path, synchronous: Synchronous) -> None:
        self.path = path
        self._synchronous = synchronous
        self._db: sqlite3.Connection | None = None

    def open(self) -> None:
        """Make or open the file and lock it. `UserError` if another process has it, or if it is no log of ours."""
        if self._db is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=0, isolation_level=None, cached_statements=256)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"The embedded log {self.path} cannot be opened: {error}.",
                remedy="Give a file in a folder that this user may write to.",
            ) from error
        try:
            self._prepare(db)
        except sqlite3.Error as error:
            db.close()
            raise self._meaning_at_open(error) from error
        except StreamprocError:
            db.close()
            raise
        self._db = db

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One atomic write: committed at the block's end, undone if it or the commit raises."""
        db = self._opened()
        try:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._meaning(error) from error
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows one by one; a caller that stops early has read no more than it took."""
        try:
            yield from self._opened().execute(sql, parameters)
        except sqlite3.Error as error:
            raise self._meaning(error) from error

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA page_size={_PAGE_BYTES}")
        # Exclusive locking in WAL mode: the lock lives as long as the connection, also for readers, and dies with us.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if not empty and db.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
            raise UserError(
                f"{self.path} is an SQLite file, but not an embedded log of streamproc.",
                remedy="Give embedded:// the path of a new file.",
            )
        if not empty and (version := db.execute("PRAGMA user_version").fetchone()[0]) != _SCHEMA_VERSION:
            raise UserError(
                f"The embedded log {self.path} has format {version}; this streamproc reads {_SCHEMA_VERSION}.",
                remedy="Install the version that wrote it, or give the path of a new file.",
            )
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={self._synchronous}")
        db.execute(f"PRAGMA journal_size_limit={_WAL_BYTES_MAX}")
        db.execute("BEGIN EXCLUSIVE")
        if empty:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        db.execute("COMMIT")

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            raise BrokerUnavailable(f"The embedded log {self.path} is closed. Start the transport before its use.")
        return self._db

    def _meaning_at_open(self, error: sqlite3.Error) -> StreamprocError:
        if _code(error) in _LOCKED:
            return UserError(
                f"The embedded log {self.path} is in use by another process.",
                remedy="Stop that process, give this one a path of its own, or use kafka:// to share a log.",
            )
        return self._meaning(error)

    def _meaning(self, error: sqlite3.Error) -> StreamprocError:
        if _code(error) in _NOT_OURS:
            return UserError(
                f"The embedded log {self.path} is damaged or no SQLite file: {error}.",
                remedy="Restore it from a backup, or give the path of a new file.",
            )
        return BrokerUnavailable(
            f"The embedded log {self.path} cannot be read or written: {error}. Nothing of this call was written. "
            "Free space on its disk and check that this user may write to it."
        )


def _code(error: sqlite3.Error) -> int:
    """The primary result code; extended ones keep it in their low byte."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF
