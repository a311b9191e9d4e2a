"""What writes a table to Redis: see `sinks.redis` for the layout. The only importer of redis-py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar, cast

import msgspec
import polars as pl
from redis import exceptions as rx
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from streamproc.commit.ledger import Ledger
from streamproc.core import limits
from streamproc.core.errors import LedgerMoved, SinkUnavailable, UserError, invariant
from streamproc.sinks.contract import SinkRows, TableShape
from streamproc.sinks.feed import check_rows
from streamproc.sinks.redis import ESCAPES, NULL_KEY, escape
from streamproc.sinks.shared import Shared

__all__ = ["RedisWriter"]

T = TypeVar("T")

_EXPIRY_MS_MIN: Final = 1
"""Some servers take an expiry before 1970 for an error: the first millisecond is as much in the past."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

# KEYS: the ledger, the rows to write, the rows to delete. ARGV: the ledger held ("" three times: none), the ledger to
# move to (no log id: do not move), how many rows are written, and a msgpack block of field names, columns of text and
# expiries. Redis does not roll a script back, so whatever can fail is looked at before the first write. That first
# write changes nothing and is of the kind a full or read-only server refuses: after it, the server lets the script end.
_SCRIPT: Final = """
local function is_hash(key)
  local kind = redis.call('TYPE', key).ok
  return kind == 'hash' or kind == 'none'
end
for _, key in ipairs(KEYS) do
  if not is_hash(key) then return {'foreign', key} end
end
local found = redis.call('HMGET', KEYS[1], 'log_id', 'incarnation', 'epoch')
for i = 1, 3 do
  if (found[i] or '') ~= ARGV[i] then return {'moved', found[1] or '', found[2] or '', found[3] or ''} end
end
redis.call('HSET', KEYS[1], 'app', ARGV[8])
local upserts = tonumber(ARGV[9])
local names, columns, expiries = unpack(cmsgpack.unpack(ARGV[10]))
for row = 1, upserts do
  local key, fields, n = KEYS[row + 1], {}, 0
  for c = 1, #names do
    local value = columns[c][row]
    if value then
      fields[n + 1], fields[n + 2] = names[c], value
      n = n + 2
    end
  end
  redis.call('DEL', key)
  redis.call('HSET', key, unpack(fields))
  if expiries[row] then redis.call('PEXPIREAT', key, expiries[row]) end
end
for row = upserts + 2, #KEYS do redis.call('DEL', KEYS[row]) end
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'log_id', ARGV[4], 'incarnation', ARGV[5], 'epoch', ARGV[6], 'hint', ARGV[7])
end
return {'done'}
"""


class _Slice(NamedTuple):
    """One atomic step: rows to write (keys and columns of text) and rows to delete."""

    upserts: list[str]
    columns: list[list[str | None]]
    expiries: list[str | None]
    deletes: list[str]


class RedisWriter:
    """One table and task in Redis. See `contract.SinkWriter`; also for what `prune` costs: it walks the whole
    keyspace."""

    def __init__(self, url: str, name: str, shape: TableShape, app_id: str, partition: int, ttl_ms: int | None) -> None:
        self._url, self._name, self._shape, self._app, self._ttl_ms = url, name, shape, app_id, ttl_ms
        self._prefix = f"{{{escape(shape.table)}:{partition}}}"
        self._ledger_key = f"{self._prefix}:ledger"
        self._fields = ["window_end", *shape.columns]
        self._client: Redis | None = None
        self._sha: str | None = None
        if len(self._fields) > limits.REDIS_FIELDS_MAX:
            raise UserError(
                f"Table {shape.table} has {len(self._fields)} columns; a Redis row takes {limits.REDIS_FIELDS_MAX}.",
                remedy="Split the table.",
            )
        for column, dtype in (shape.keys | shape.columns).items():
            _check_type(shape.table, column, dtype)

    async def open(self) -> None:
        first = self._client is None
        if self._client is None:
            try:
                self._client = _clients.acquire(self._url)
            except ValueError:
                raise UserError(
                    f"The URL of {self._name} has an option that redis-py does not take.",
                    remedy="Check what stands behind its question mark.",
                ) from None
        try:
            await self._check_policy()
        except BaseException:  # whatever it was, a writer that never opened must not keep connections from closing
            if first:
                await self.close()
            raise

    async def _check_policy(self) -> None:
        memory = cast("dict[str, Any]", await self._call(lambda client: client.info("memory")))
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise UserError(
                f"{self._name} has maxmemory-policy {policy}: it may drop rows and the ledger without telling anybody.",
                remedy="Set maxmemory-policy noeviction in its configuration (and enough maxmemory).",
            )

    async def close(self) -> None:
        if self._client is not None:
            self._client = None
            await _clients.release(self._url)

    async def read(self) -> Ledger | None:
        names = ["log_id", "incarnation", "epoch", "hint", "app"]
        found = cast("list[bytes | None]", await self._call(lambda client: client.hmget(self._ledger_key, names)))
        log_id, incarnation, epoch, hint, app = (None if v is None else v.decode() for v in found)
        if log_id is None:
            return None
        if app != self._app:
            raise UserError(
                f"Table {self._shape.table} in {self._name} is written by application {app!r}, not by {self._app!r}.",
                remedy="Name the table differently, use another database of the server, or delete the other's keys "
                f"({self._prefix}:*).",
            )
        return Ledger(log_id, int(incarnation or 0), int(epoch or 0), int(hint or 0))

    async def apply(self, rows: SinkRows | None, *, held: Ledger | None, moved: Ledger) -> None:
        slices = list(self._slices(rows)) if rows is not None else []
        await self._write(slices or [_Slice([], [], [], [])], held, moved)

    async def prune(
        self,
        live: Collection[tuple[object, ...]],
        *,
        since_ms: int,
        mine: Callable[[tuple[object, ...]], bool],
        held: Ledger,
    ) -> int:
        keep = live if isinstance(live, (set, frozenset)) else set(live)
        doomed: list[str] = []
        cursor = 0
        while True:
            cursor, keys = await self._scan(cursor)
            for key in keys:
                row = self._identity(key)
                if row is not None and cast("int", row[-1]) >= since_ms and row not in keep and mine(row[:-1]):
                    doomed.append(key)
            if cursor == 0:
                break
        doomed = list(dict.fromkeys(doomed))  # a scan may show a key twice
        slices = [_Slice([], [], [], part) for part in _parts(doomed)]
        await self._write(slices or [_Slice([], [], [], [])], held, None)
        return len(doomed)

    async def forget(self) -> bool:
        if await self.read() is None:  # also refuses what is another application's
            return False
        return bool(await self._call(lambda client: client.delete(self._ledger_key)))

    async def _scan(self, cursor: int) -> tuple[int, list[str]]:
        pattern = _glob_escape(self._prefix) + ":*"
        found = await self._call(lambda client: client.scan(cursor, match=pattern, count=limits.REDIS_SCAN_COUNT))
        return int(found[0]), [key.decode("utf-8", "replace") for key in cast("list[bytes]", found[1])]

    async def _write(self, slices: list[_Slice], held: Ledger | None, moved: Ledger | None) -> None:
        """Slices in turn, each only if the ledger is ``held``; the last moves it (``moved`` None: never)."""
        for at, piece in enumerate(slices):
            last = at == len(slices) - 1
            arguments: list[str | bytes] = [
                *_ledger_arguments(held)[:3],
                *_ledger_arguments(moved if last else None),
                self._app,
                str(len(piece.upserts)),
                msgspec.msgpack.encode([self._fields, piece.columns, piece.expiries]),
            ]
            await self._step([self._ledger_key, *piece.upserts, *piece.deletes], arguments)

    async def _step(self, keys: list[str], arguments: list[str | bytes]) -> None:
        outcome = await self._call(lambda client: self._run(client, keys, arguments))
        status, *detail = (part.decode("utf-8", "replace") for part in outcome)
        if status == "foreign":
            raise UserError(
                f"{self._name} has a key {detail[0]!r} that is not a hash, where a row of table {self._shape.table} "
                "belongs.",
                remedy="Delete that key or name the table differently.",
            )
        if status == "moved":
            raise LedgerMoved(
                f"The ledger of table {self._shape.table} in {self._name} is at (log, incarnation, epoch) = "
                f"{tuple(detail)}, not where this task left it ({arguments[:3]})."
            )

    async def _run(self, client: Redis, keys: list[str], arguments: list[str | bytes]) -> Any:
        if self._sha is None:
            self._sha = await client.script_load(_SCRIPT)
        try:
            return await client.evalsha(self._sha, len(keys), *keys, *arguments)
        except rx.NoScriptError:  # the server was restarted: it keeps rows, not scripts
            self._sha = await client.script_load(_SCRIPT)
            return await client.evalsha(self._sha, len(keys), *keys, *arguments)

    async def _call(self, call: Callable[[Redis], Awaitable[T]]) -> T:
        invariant(self._client is not None, f"The writer to {self._name} was used before open() or after close().")
        with _failures(self._name):
            return await call(cast("Redis", self._client))

    def _slices(self, rows: SinkRows) -> Iterator[_Slice]:
        check_rows(rows, self._shape)
        expiries = self._expiries(rows)
        keys = self._keys(rows.upserts)
        step = limits.REDIS_SLICE_ROWS_MAX
        if keys:
            text = [_as_text(rows.upserts[name]) for name in self._fields]
            for lo in range(0, len(keys), step):
                cut = slice(lo, lo + step)
                yield _Slice(keys[cut], [column[cut].to_list() for column in text], expiries[cut], [])
        for part in _parts(self._keys(rows.deletes)):
            yield _Slice([], [], [], part)

    def _expiries(self, rows: SinkRows) -> list[str | None]:
        if self._ttl_ms is not None and not rows.upserts.is_empty():
            ends = rows.upserts["window_end"].dt.epoch("ms") + self._ttl_ms
            return ends.clip(_EXPIRY_MS_MIN).cast(pl.String).to_list()
        at = None if rows.expire_at_ms is None else str(max(rows.expire_at_ms, _EXPIRY_MS_MIN))
        return [at] * rows.upserts.height

    def _keys(self, frame: pl.DataFrame) -> list[str]:
        """Redis keys of ``frame``'s rows; `row_key` says the same for one row."""
        if frame.is_empty():
            return []
        parts = [_escaped(frame[name]) for name in self._shape.keys]
        starts = _as_text(frame["window_start"]).to_list()
        return [":".join((self._prefix, *of)) for of in zip(*parts, starts, strict=True)]

    def _identity(self, key: str) -> tuple[object, ...] | None:
        """What row a Redis key names; None for the ledger and for keys that are none of ours."""
        parts = key[len(self._prefix) + 1 :].split(":")
        if len(parts) != len(self._shape.keys) + 1:
            return None
        try:
            values = [_parsed(part, dtype) for part, dtype in zip(parts[:-1], self._shape.keys.values(), strict=True)]
            return (*values, int(parts[-1]))
        except ValueError:
            return None


def _unescape(text: str) -> str:
    for plain, escaped in reversed(ESCAPES):
        text = text.replace(escaped, plain)
    return text


def _glob_escape(text: str) -> str:
    return "".join("\\" + c if c in "*?[]^-\\" else c for c in text)


def _escaped(series: pl.Series) -> list[str]:
    """A column of group keys as they stand inside a Redis key."""
    texts = _as_text(series).to_list()
    how = escape if series.dtype == pl.String else str
    return [NULL_KEY if text is None else how(text) for text in texts]


def _as_text(series: pl.Series) -> pl.Series:
    """A column as the text Redis keeps."""
    dtype = series.dtype
    if dtype == pl.Boolean:
        series = series.cast(pl.Int8)
    elif isinstance(dtype, pl.Datetime):
        series = series.cast(pl.Int64) if dtype.time_unit == "ms" else series.dt.epoch("ms")
    return series if dtype == pl.String else series.cast(pl.String)


def _parsed(text: str, dtype: pl.DataType) -> object:
    """A group key out of a Redis key, as Polars would give it. `ValueError` if it cannot be one."""
    if text == NULL_KEY:
        return None
    if dtype == pl.String:
        return _unescape(text)
    if dtype == pl.Boolean:
        return bool(int(text))
    if dtype == pl.Date:
        return date.fromisoformat(text)
    if isinstance(dtype, pl.Datetime):
        return _EPOCH + timedelta(milliseconds=int(text))
    return int(text)


def _check_type(table: str, column: str, dtype: pl.DataType) -> None:
    if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Date) or isinstance(dtype, pl.Datetime)):
        raise UserError(
            f"Column {column} of table {table} is of type {dtype}, which the Redis sink cannot hold.",
            remedy="Make it text, a number, a boolean, a date or a time with with_columns() before .table().",
        )


def _parts(keys: list[str]) -> list[list[str]]:
    step = limits.REDIS_SLICE_ROWS_MAX
    return [keys[lo : lo + step] for lo in range(0, len(keys), step)]


def _ledger_arguments(ledger: Ledger | None) -> list[str]:
    if ledger is None:
        return ["", "", "", ""]
    return [ledger.log_id, str(ledger.incarnation), str(ledger.epoch), str(ledger.hint)]


def _connect(url: str) -> Redis:
    # No retries inside: a repeated script whose answer was lost would find its own ledger and call it a stranger's.
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=limits.SINK_CONNECTIONS_MAX,
        timeout=limits.SINK_TIMEOUT_S,
        socket_timeout=limits.SINK_TIMEOUT_S,
        socket_connect_timeout=limits.SINK_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    return Redis.from_pool(pool)


async def _disconnect(client: Redis) -> None:
    await client.aclose()


_clients: Final = Shared(_connect, _disconnect)

_REFUSED = (
    rx.AuthenticationError,
    rx.AuthenticationWrongNumberOfArgsError,
    rx.AuthorizationError,
    rx.NoPermissionError,
)
_NOT_NOW = (rx.ReadOnlyError, rx.OutOfMemoryError, rx.ClusterDownError, rx.MasterDownError, rx.TryAgainError)
_NOT_NOW_CODES = ("BUSY", "LOADING", "MISCONF", "NOREPLICAS", "OOM", "READONLY", "MASTERDOWN", "CLUSTERDOWN")


@contextmanager
def _failures(name: str) -> Iterator[None]:
    """redis-py's exceptions by consequence. Their texts are the server's and carry no password."""
    try:
        yield
    except (rx.RedisError, OSError) as error:
        # What a handshake was refused for comes wrapped in a ConnectionError.
        told = error.__cause__ if isinstance(error.__cause__, rx.RedisError) else error
        raise _consequence(name, told) from error


def _consequence(name: str, error: BaseException) -> SinkUnavailable | UserError:
    text = str(error) or type(error).__name__
    if isinstance(error, _REFUSED):
        return UserError(
            f"{name} refuses this user: {text}.", remedy="Check user and password in the URL, and the ACL."
        )
    if isinstance(error, rx.MovedError):
        return UserError(
            f"{name} is one node of a cluster of several, and another one holds this table.",
            remedy="Give the URL of a cluster-aware proxy, or of a server that holds all slots.",
        )
    if isinstance(error, rx.InvalidResponse):
        return UserError(f"What answers at {name} is not a Redis.", remedy="Check host and port in the URL.")
    if isinstance(error, rx.ResponseError) and not isinstance(error, _NOT_NOW) and not text.startswith(_NOT_NOW_CODES):
        return UserError(
            f"{name} refused a command: {text}.",
            remedy="Check the URL and the server's version: 6.2 or later is needed.",
        )
    return SinkUnavailable(f"{name} does not answer or cannot write now: {text}.")
