"""A batch of mutated values, decoded by `avro.decode.Decoder` and judged record by record by the plain decoder."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from fuzz.guard import guarded
from fuzz.mutate import mutated
from fuzz.schemas import Pair
from fuzz.valid import valid_record
from streamproc.avro.columns import column_type, columns_of, hashable
from streamproc.avro.decode import ROW, BadRecord, Decoded, Decoder, Use, hash_names
from streamproc.avro.faults import Malformed
from streamproc.avro.strict import Shape, decode_record
from streamproc.avro.wire import Unframed, frame, unframe
from streamproc.core.batch import BUFFER_SLACK, U8, RawBatch
from streamproc.core.hash128 import hash_value_python
from streamproc.core.types import Offset, TopicPartition

__all__ = ["MUTATED_PER_BATCH", "Input", "Verdict", "batch_of", "decode_and_judge", "draw_columns", "draw_values"]

MUTATED_PER_BATCH: Final = 2_000
VALID_EVERY: Final = 16
"""After so many mutated values comes one as it was: what stands beside bad records must still be right."""
POOL: Final = 200
"""Valid values of a batch; each is mutated many times over, so texts repeat as they do in real topics."""
HEADER_MUTATED: Final = 0.04
_SHAPE: Final = Shape()
_EVOLUTION: Final = ("does not resolve", "enum symbol", "invalid UTF-8")
"""What a valid record may be refused for by a later reader: it cannot take this branch or symbol, or reads bytes as text."""

Place = Callable[[bytes], U8]
"""Puts the bytes of a batch where they are to lie."""


@dataclass(frozen=True)
class Input:
    """Values of one batch; which of them are mutated."""

    values: Sequence[bytes | None]
    mutated: Sequence[bool]


@dataclass(frozen=True)
class Verdict:
    """``wrong``: row and what is wrong with it; rows may repeat."""

    refused: int
    wrong: list[tuple[int, str]]


def draw_values(rng: random.Random, pair: Pair, mutations: int = MUTATED_PER_BATCH) -> Input:
    ids = sorted(pair.writers)
    pool = [(i, valid_record(rng, pair.writers[i].root)) for i in rng.choices(ids, k=POOL)]
    values: list[bytes | None] = []
    changed: list[bool] = []
    for i in range(mutations):
        schema_id, payload = pool[i % POOL]
        values.append(_mutated_value(rng, schema_id, payload, pool[int(rng.random() * POOL)][1]))
        changed.append(True)
        if i % VALID_EVERY == 0:
            values.append(frame(*pool[int(rng.random() * POOL)]))
            changed.append(False)
    return Input(values, changed)


def _mutated_value(rng: random.Random, schema_id: int, payload: bytes, other: bytes) -> bytes | None:
    if rng.random() >= HEADER_MUTATED:
        return frame(schema_id, mutated(rng, payload, other))
    if rng.random() < 0.1:
        return None
    value = frame(schema_id, payload)
    if rng.random() < 0.2:
        return value[: rng.randrange(5)]
    head = bytearray(value[:5])
    head[rng.randrange(5)] ^= rng.randint(1, 255)
    return bytes(head) + value[5:]


def draw_columns(rng: random.Random, pair: Pair) -> dict[str, Use]:
    """Some of the columns that the kernel can make, each as values, hashes or both; the verdict may not depend on it."""
    uses = {}
    share = rng.choice((0.0, 0.5, 1.0, 1.0))
    for name in columns_of(pair.reader):
        type_ = column_type(pair.reader, name)
        if type_.kind != "other" and rng.random() < share:
            some = (Use.VALUE, Use.VALUE, Use.VALUE | Use.HASH, Use.HASH)
            uses[name] = rng.choice(some) if hashable(type_) else Use.VALUE
    return uses


def draw_place(rng: random.Random) -> Place:
    """Mostly against a forbidden page, behind or before it; the slack behind the last value holds anything."""
    slack = rng.choice((bytes(BUFFER_SLACK), b"\xff" * BUFFER_SLACK, b"\x80" * BUFFER_SLACK, b"a" * BUFFER_SLACK))
    kind = rng.random()
    if kind < 0.25:  # no slack at all: the decoder must see to it
        return lambda data: np.frombuffer(bytearray(data), np.uint8)
    return lambda data: guarded(data + slack, at_end=kind < 0.75)


def batch_of(values: Sequence[bytes | None], place: Place) -> RawBatch:
    """Values side by side, the first at the buffer's first byte."""
    lengths = np.array([-1 if v is None else len(v) for v in values], np.int64)
    sizes = np.maximum(lengths, 0)
    starts, rows = np.cumsum(sizes) - sizes, np.arange(len(values))
    none = np.full(len(values), -1, np.int64)
    buffer, end = place(b"".join(v or b"" for v in values)), Offset(len(values))
    return RawBatch(TopicPartition("fuzz", 0), buffer, rows, rows, none, none, starts, lengths, none, none, end)


def decode_and_judge(pair: Pair, columns: dict[str, Use], given: Input, batch: RawBatch) -> Verdict:
    """``batch`` is of the values of ``given``, which the plain decoder reads one by one."""
    decoded = Decoder(pair.reader, pair, columns).decode(batch)
    records, bad = _read_plainly(pair, given.values)
    wrong = _wrong_refusals(decoded.bad, bad)
    excused = _EVOLUTION if len(pair.writers) > 1 else ()
    for row, refusal in bad.items():
        if not given.mutated[row] and not refusal.reason.startswith(excused):
            wrong.append((row, f"is valid and was refused: {refusal.reason}"))
    rows = decoded.frame[ROW].to_list()
    if rows != list(records):
        odd = sorted(set(rows) ^ set(records)) or [-1]
        wrong.append((odd[0], "is among the decoded ones and should not be, or is missing there"))
    else:
        wrong += _wrong_values(pair, columns, decoded, records)
    return Verdict(len(bad), wrong)


def _read_plainly(pair: Pair, values: Sequence[bytes | None]) -> tuple[dict[int, Any], dict[int, BadRecord]]:
    trees = pair.trees()
    records: dict[int, Any] = {}
    bad: dict[int, BadRecord] = {}
    for row, value in enumerate(values):
        schema_id: int | None = None
        try:
            schema_id, payload = unframe(value)
            if schema_id not in trees:
                bad[row] = BadRecord(row, f"unknown schema id {schema_id}", schema_id)
                continue
            records[row] = decode_record(trees[schema_id], payload, _SHAPE)
        except (Unframed, Malformed) as error:
            bad[row] = BadRecord(row, str(error), schema_id)
    return records, bad


def _wrong_refusals(found: list[BadRecord], wanted: dict[int, BadRecord]) -> list[tuple[int, str]]:
    by_row = {record.row: record for record in found}
    wrong = [] if list(by_row) == sorted(by_row) and len(by_row) == len(found) else [(-1, "refusals are out of order")]
    for row in sorted(by_row.keys() | wanted.keys()):
        if by_row.get(row) != wanted.get(row):
            wrong.append((row, f"kernel says {_said(by_row.get(row))}, the plain decoder {_said(wanted.get(row))}"))
    return wrong


def _said(refusal: BadRecord | None) -> str:
    return "good" if refusal is None else repr((refusal.reason, refusal.schema_id))


def _wrong_values(
    pair: Pair, columns: dict[str, Use], decoded: Decoded, records: dict[int, Any]
) -> list[tuple[int, str]]:
    wrong = []
    rows = list(records)
    for name, use in columns.items():
        plain = [record[name] for record in records.values()]
        compared = []
        if Use.VALUE in use:
            compared.append((name, _bits(decoded.frame[name]), [_bits_of(value) for value in plain]))
        if Use.HASH in use:
            hashes = [(None, None) if value is None else hash_value_python(value) for value in plain]
            for side, words in zip(hash_names(name), zip(*hashes, strict=True), strict=bool(hashes)):
                compared.append((side, decoded.frame[side].to_list(), list(words)))
        for column, found, wanted in compared:
            if found != wanted:
                at = next(i for i, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other)
                said = f"column {column}: kernel says {found[at]!r}, the plain decoder {wanted[at]!r}"
                wrong.append((rows[at], said))
    return wrong


def _bits(series: pl.Series) -> list[Any]:
    """Values as they are stored: times as integers, floats as their eight bytes, so that NaNs and zeros differ."""
    stored = series.to_physical()
    if not stored.dtype.is_float():
        return stored.to_list()
    valid = stored.is_not_null().to_list()
    words = stored.fill_null(0.0).to_numpy().view(np.int64).tolist()
    return [word if there else None for word, there in zip(words, valid, strict=True)]


def _bits_of(value: Any) -> Any:
    return _DOUBLE.unpack(struct.pack("<d", value))[0] if isinstance(value, float) else value


_DOUBLE: Final = struct.Struct("<q")
