"""Rows as Redis hashes, with the ledger beside them in the same slot. Works with Redis 6.2 and later, and with Valkey.

    {revenue:3}:ledger                  log_id, incarnation, epoch, hint, app
    {revenue:3}:DE:1357002000000        orders=17, revenue=812.5, window_end=1357005600000

A row's key is `{table:partition}:key:window_start_ms`, where *key* is the group keys joined by ``:``. Inside a group
key (and the table's name) ``%`` is written ``%25``, ``:`` is ``%3A``, braces are ``%7B`` and ``%7D``; a null key is
``%00``, which no text can be mistaken for. Which partition a key is in: `core.partitioner`.

Values: null = field absent; booleans ``1`` and ``0``; floats the shortest text that reads back as the same number (also
``NaN``, ``inf``, ``-inf``); times milliseconds since the epoch; dates ISO. Fields of a row are always replaced
together.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Final
from urllib.parse import parse_qs, urlsplit

from streamproc.core.durations import Duration, milliseconds
from streamproc.core.errors import UserError
from streamproc.sinks.contract import SinkWriter, TableShape

__all__ = ["ESCAPES", "NULL_KEY", "RedisSink", "escape", "redis", "row_key"]

NULL_KEY: Final = "%00"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def redis(url: str, *, ttl: Duration | None = None) -> RedisSink:
    """A sink that keeps a table as Redis hashes.

    ``url``: ``redis://``, ``rediss://`` (TLS) or ``unix://``, as redis-py takes it. ``ttl``: a row leaves Redis by
    itself this long after its window's end, **in event time**: a replay of old data writes rows that are gone at once.
    The server must not evict (`maxmemory-policy noeviction`), or rows would vanish without the ledger knowing.
    """
    with suppress(ImportError):  # `RedisSink.writer` says what is missing
        import streamproc.sinks.redis_writer  # noqa: F401  # now, off the way of the first record
    return RedisSink(url, None if ttl is None else milliseconds(ttl, setting="ttl"))


class RedisSink:
    """See `redis`."""

    def __init__(self, url: str, ttl_ms: int | None) -> None:
        self._url, self._ttl_ms = url, ttl_ms
        self._name = _public_name(url)

    @property
    def name(self) -> str:
        return self._name

    def writer(self, shape: TableShape, app_id: str, partition: int) -> SinkWriter:
        try:
            from streamproc.sinks.redis_writer import RedisWriter
        except ImportError as error:
            raise UserError(
                f"The sink {self._name} needs the package redis, which is not installed.",
                remedy='Run: pip install "streamproc[redis]".',
            ) from error
        return RedisWriter(self._url, self._name, shape, app_id, partition, self._ttl_ms)


def row_key(table: str, partition: int, key: tuple[object, ...], window_start_ms: int) -> str:
    """The Redis key of one row, for whoever reads it. Key values as Python has them; None is the null key."""
    parts = [NULL_KEY if value is None else escape(_key_text(value)) for value in key]
    return ":".join([f"{{{escape(table)}:{partition}}}", *parts, str(window_start_ms)])


def _key_text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, datetime):
        return str(((value if value.tzinfo else value.replace(tzinfo=UTC)) - _EPOCH) // timedelta(milliseconds=1))
    return value.isoformat() if isinstance(value, date) else str(value)


ESCAPES: Final = (("%", "%25"), (":", "%3A"), ("{", "%7B"), ("}", "%7D"))


def escape(text: str) -> str:
    for plain, escaped in ESCAPES:
        text = text.replace(plain, escaped)
    return text


def _public_name(url: str) -> str:
    """The URL without user, password and options; a URL that no Redis client could use is refused (and never shown)."""
    remedy = "Write redis://host:6379/0, rediss://host:6379/0 or unix:///path/to/socket."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError("The URL of a Redis sink has no valid host and port.", remedy=remedy) from None
    if parts.scheme == "unix" and parts.path:
        database = parse_qs(parts.query).get("db", ["0"])[0]
        return f"unix://{parts.path}/{database}"
    if parts.scheme in ("redis", "rediss") and parts.hostname:
        database = parts.path.strip("/") or parse_qs(parts.query).get("db", ["0"])[0]
        if database.isdigit():
            return f"{parts.scheme}://{parts.hostname}:{port or 6379}/{database}"
    raise UserError(f"The URL of a Redis sink ({parts.scheme or 'no scheme'}://…) is not one.", remedy=remedy)
