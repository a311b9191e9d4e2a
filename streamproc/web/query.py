"""Which row a point query means: its key columns and window, checked and encoded as the task that owns it would."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, time, timedelta
from typing import Any, NamedTuple

import msgspec
import polars as pl

from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of
from streamproc.operators.groupkeys import encode_group_key
from streamproc.runtime.inspect import TableFacts
from streamproc.state.packing import pack_key
from streamproc.web.answers import Question, Refused, nearest, read_time
from streamproc.web.graph import span

__all__ = ["RowPlace", "matches", "object_key", "row_place", "tokens"]


class RowPlace(NamedTuple):
    """A row of a windowed table: its key in the store, and the partition that owns it."""

    key: bytes
    partition: int
    window_start: int


def row_place(table: TableFacts, question: Question) -> RowPlace:
    """Every key column must be named, spelt ``column=`` or ``key.column=``; ``null=column`` asks for a null."""
    assert table.plan is not None
    keys = table.plan.keys
    null = question.text("null") if "null" not in keys else question.text("key.null")
    nulls = {name for name in (null or "").split(",") if name}
    for name in nulls - keys.keys():
        raise Refused(400, f"null={name!r} is not a key column of {table.name}.", nearest(name, keys), parameter="null")
    start = question.time("window_start")
    values: list[object] = []
    missing: list[str] = []
    for name, dtype in keys.items():
        text = question.text(f"key.{name}")
        if text is None and name != "window_start":
            text = question.text(name)
        if text is None and name not in nulls:
            missing.append(name)
        values.append(None if text is None else _value(text, name, dtype))
    question.done(*keys, "window_start")
    if missing or start is None:
        names = [*missing, *(["window_start"] if start is None else [])]
        raise Refused(400, f"A row of {table.name} is named by {', '.join([*keys, 'window_start'])}: "
                           f"{', '.join(names)} is missing.", parameter=names[0])  # fmt: skip
    _check_start(table, start)
    partition = partition_of(encode_group_key(values, keys), table.partitions)
    return RowPlace(table.rows.row_key(start, values), partition, start)


def _check_start(table: TableFacts, start: int) -> None:
    assert table.plan is not None
    window = table.plan.window
    if (into := (start - window.offset_ms) % window.size_ms) != 0:
        raise Refused(400, f"No window of {table.name} begins at {start}.",
                      f"Its windows begin every {span(window.size_ms)}; the one that holds this time begins at "
                      f"{start - into}.", parameter="window_start", window_start=start - into)  # fmt: skip


def _value(text: str, name: str, dtype: pl.DataType) -> object:
    """A key column's value out of a parameter."""
    try:
        if dtype == pl.String:
            return text
        if dtype == pl.Boolean:
            return {"true": True, "false": False}[text.lower()]
        if dtype.is_integer():
            return _integer(text, dtype)
        return _temporal(text, name, dtype)
    except (ValueError, KeyError, OverflowError):
        raise Refused(400, f"{name}={text!r} is not a {dtype} as the key column {name} holds it.",
                      parameter=name) from None  # fmt: skip


def _integer(text: str, dtype: pl.DataType) -> int:
    number = int(text)
    if pl.Series([number]).cast(dtype, strict=False).null_count():
        raise ValueError
    return number


def _temporal(text: str, name: str, dtype: pl.DataType) -> object:
    if isinstance(dtype, pl.Datetime):
        moment = datetime.fromisoformat("1970-01-01T00:00:00+00:00") + timedelta(milliseconds=read_time(text, name))
        return moment if dtype.time_zone else moment.replace(tzinfo=None)
    if dtype == pl.Date:
        return date.fromisoformat(text)
    if dtype == pl.Time:
        return time.fromisoformat(text)
    if isinstance(dtype, pl.Duration):
        return timedelta(milliseconds=int(text))
    raise ValueError


def object_key(table: TableFacts, question: Question) -> bytes:
    """The stored key of an `app.Table` row out of ``key=JSON``; arrays are tuples. Text may be written without quotes
    if it is no other JSON."""
    text = question.text("key")
    question.done()
    if text is None:
        raise Refused(400, "The parameter key is missing.", 'Write key=JSON, for example key="UA" or key=["UA",1].')
    try:
        key = msgspec.json.decode(text.encode())
    except msgspec.DecodeError:
        key = text
    try:
        return pack_key(_tuples(key), table.name)
    except UserError as bad:
        raise Refused(400, str(bad), parameter="key") from bad


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def tokens(text: str | None) -> list[str]:
    """What a filter looks for: every word of it, whatever its case."""
    return (text or "").casefold().split()


def matches(words: Iterable[str], names: Iterable[str], values: Iterable[object]) -> bool:
    """Whether every word is in some ``column=value`` of a key."""
    spelt = [f"{name}={_spelt(value)}" for name, value in zip(names, values, strict=True)]
    return all(any(word in part for part in spelt) for word in words)


def _spelt(value: object) -> str:
    return "null" if value is None else str(value).casefold()
