"""A store on disk: one RocksDB per task folder, raw bytes, one WriteBatch an epoch.

The changelog is the durable record; the folder saves replaying it. So the write-ahead log is on (a commit survives
kill -9 of the process) and never forced to disk (after a power loss the store is older, and restore rolls it forward).

RocksDB reports every failure as a bare ``Exception`` with a text. `_told` is the one place that reads those texts.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from rocksdict import (
    BlockBasedOptions,
    Cache,
    DbClosedError,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
)

from streamproc.core import limits
from streamproc.core.errors import InvariantBroken, RestoreNeeded, UserError, invariant
from streamproc.state.contract import Run, StoreMeta, Writes

__all__ = ["RocksDBStore", "destroy", "open_or_discard"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

META_KEY: Final = b"\x00"
"""Shorter than any table's prefix, so it sorts before every row and is none."""
FIRST_ROW: Final = b"\x00\x00"
SCAN_PAGE_ROWS: Final = 1_000
DAMAGED: Final = "DAMAGED"
"""A file of this name in the folder: the data was found corrupt while in use, and must not be opened again."""

_ERRNOS: Final = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "Too many open files": errno.EMFILE,
}
_LOCKED: Final = ("lock hold by current process", "While lock file")
_DAMAGE: Final = ("Corruption", "No such file or directory", "Invalid argument", "Not implemented")
"""How RocksDB begins or words what only a new folder can mend; a missing table file is among it."""

_cache: list[Cache] = []


def open_or_discard(path: Path) -> RocksDBStore:
    """The store in ``path``; a damaged folder is thrown away (the changelog brings its rows back) and made anew."""
    try:
        return RocksDBStore(path)
    except RestoreNeeded as damaged:
        logger.warning("%s The folder is made anew.", damaged)
        destroy(path)
        return RocksDBStore(path)


def destroy(path: Path) -> None:
    """Remove the folder of a closed store. Renamed first: a crash half-way leaves no half of a database behind."""
    aside = path.with_name(path.name + ".discarded")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


class RocksDBStore:
    """See `Store`. Opening raises `UserError` if another owner holds the folder, `RestoreNeeded` (with its path) if the
    data is damaged, `OSError` if the disk refuses. After a refused write nothing more is written until it is opened
    again: RocksDB might take a later epoch where it refused an earlier one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db: Any = None
        self._refused: OSError | None = None
        self._open()

    def meta(self) -> StoreMeta | None:
        data = self._call(lambda db: db.get(META_KEY))
        if data is None:
            return None
        try:
            return msgspec.msgpack.decode(data, type=StoreMeta)
        except msgspec.DecodeError as bad:
            raise self._damage(f"its meta record cannot be read: {bad}") from bad

    def get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as told:  # the hot path: `_call` without its closure; RocksDB raises bare Exceptions
            raise self._told(told) from told
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in keys]  # measured: RocksDB's multi-get through rocksdict is slower

    def scan(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        # Page by page into a list: a live iterator of RocksDB would keep the folder's lock beyond `close`.
        start = max(start, FIRST_ROW)
        while stop is None or start < stop:
            page = self._page(start, stop)
            yield from page
            if len(page) < SCAN_PAGE_ROWS:
                return
            start = page[-1][0] + b"\x00"

    def write(self, writes: Writes, meta: StoreMeta) -> None:
        ours = (
            META_KEY in writes.puts
            or META_KEY in writes.deletes
            or any(META_KEY in run.keys[:1] for run in writes.runs)
        )
        invariant(not ours, "A row's key is the meta record's.")
        if self._refused is not None:
            raise OSError(self._refused.errno, f"{self._refused.strerror} (an earlier write; open the store again)")
        batch = WriteBatch(raw_mode=True)
        for start, stop in writes.ranges:
            if start < stop:
                batch.delete_range(start, stop)
        for key in sorted(writes.deletes):
            batch.delete(key)
        keys = sorted(writes.puts)
        for run in (Run(keys, [*map(writes.puts.__getitem__, keys)]), *writes.runs):
            deque(map(batch.put, run.keys, run.values), maxlen=0)  # a loop in C
        batch.put(META_KEY, msgspec.msgpack.encode(meta))  # last: no range can take it away
        try:
            self._call(lambda db: db.write(batch))
        except OSError as refused:
            self._refused = refused
            raise

    def wipe(self) -> None:
        self.close()
        destroy(self.path)
        self._open()

    def size_bytes(self) -> int:
        names = ("rocksdb.total-sst-files-size", "rocksdb.cur-size-all-mem-tables")
        return sum(self._call(lambda db: [db.property_int_value(name) or 0 for name in names]))

    def close(self) -> None:
        db, self._db = self._db, _Closed()
        if isinstance(db, Rdict):
            try:
                db.close()
            except Exception as told:  # RocksDB repeats an earlier refusal here; the lock is released all the same
                logger.warning("Closing the store in %s: %s", self.path, told)

    def _open(self) -> None:
        self._refused = None
        if (self.path / DAMAGED).exists():
            raise RestoreNeeded(f"The store in {self.path} was found damaged.")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._db = Rdict(str(self.path), _options())
        except Exception as told:  # RocksDB raises bare Exceptions
            raise self._told(told, opening=True) from told

    def _page(self, start: bytes, stop: bytes | None) -> list[tuple[bytes, bytes]]:
        def read(db: Rdict) -> list[tuple[bytes, bytes]]:
            bounds = ReadOptions()
            if stop is not None:
                bounds.set_iterate_upper_bound(stop)
            rows, page = db.iter(bounds), list[tuple[bytes, bytes]]()
            rows.seek(start)
            valid, key, value, step = rows.valid, rows.key, rows.value, rows.next
            while len(page) < SCAN_PAGE_ROWS and valid():
                page.append((key(), value()))
                step()
            rows.status()  # raises: an iterator also ends, silently, at a block it cannot read
            return page

        return self._call(read)

    def _call(self, what: Callable[[Any], T]) -> T:
        try:
            return what(self._db)
        except Exception as told:  # RocksDB raises bare Exceptions
            raise self._told(told) from told

    def _told(self, told: Exception, *, opening: bool = False) -> Exception:
        """What RocksDB's text means by consequence."""
        if isinstance(told, TypeError):
            return InvariantBroken(f"The store in {self.path} was called with something else than bytes: {told}.")
        if isinstance(told, DbClosedError):
            return InvariantBroken(f"The store in {self.path} was used after it was closed.")
        text = str(told)
        if any(words in text for words in _LOCKED):
            return UserError(
                f"The state folder {self.path} is in use by another store"
                f"{' of this process' if _LOCKED[0] in text else ', of another process'}.",
                remedy="Stop the other worker, or give each its own data folder.",
            )
        for words, number in _ERRNOS.items():
            if words in text:
                return OSError(number, f"{os.strerror(number)}: the store refused ({text})", str(self.path))
        if text.startswith("Corruption") or (opening and any(words in text for words in _DAMAGE)):
            return self._damage(text)
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: the store failed ({text})", str(self.path))

    def _damage(self, how: str) -> RestoreNeeded:
        with suppress(OSError):
            (self.path / DAMAGED).touch()
        return RestoreNeeded(f"The store in {self.path} is damaged: {how}.")


class _Closed:
    """Stands where the database was; any use of it says so."""

    def __getattr__(self, name: str) -> Any:
        raise DbClosedError(name)


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(limits.STORE_MEMTABLE_BYTES)
    options.set_max_write_buffer_number(2)
    options.set_max_background_jobs(2)
    options.set_max_open_files(limits.STORE_OPEN_FILES_MAX)
    options.set_compression_type(DBCompressionType.lz4())
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(1 << 20)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    tables = BlockBasedOptions()
    tables.set_bloom_filter(10, False)
    if not _cache:
        _cache.append(Cache(limits.STORE_CACHE_BYTES))  # one for all tasks of the worker
    tables.set_block_cache(_cache[0])
    options.set_block_based_table_factory(tables)
    return options
