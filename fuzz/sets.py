"""Mutated record sets, read by `avro.recordbatch.parse` and by the plain reading: refused by both, or equal."""

from __future__ import annotations

import gzip
import random
import struct
from dataclasses import dataclass
from typing import Final

import cramjam
import google_crc32c
import lz4.frame
import numpy as np

from fuzz.guard import guarded
from fuzz.mutate import mutated
from fuzz.plainset import PlainRow, Refused, read_plainly
from fuzz.valid import varint
from streamproc.avro import recordbatch
from streamproc.avro.recordbatch import CorruptBatch, parse
from streamproc.core.batch import BUFFER_SLACK, RawBatch
from streamproc.core.types import Offset, TopicPartition

__all__ = ["RecordSet", "draw_set", "judge_set"]

RECORDS_MAX: Final = 12
RECORD_MUTATED: Final = 0.04
_TP: Final = TopicPartition("fuzz", 0)
_PACKERS: Final = {
    1: lambda data: gzip.compress(data, 1, mtime=0),
    2: cramjam.snappy.compress_raw,
    3: lz4.frame.compress,
    4: cramjam.zstd.compress,
}


@dataclass(frozen=True)
class RecordSet:
    data: bytes
    position: int
    damaged: bool
    """Mutated behind the compression: codecs may differ in what they still unpack, so only bounds are judged."""


def draw_set(rng: random.Random) -> RecordSet:
    """One to three batches with right checksums, whatever else is wrong; a few are mutated once more as a whole."""
    base, data, damaged = rng.choice((0, 0, 1_000, (1 << 63) - 40)), b"", False
    position = base + rng.choice((0, 0, 0, 1, 5, 14))
    for _ in range(rng.randint(1, 3)):
        count = rng.randint(0, RECORDS_MAX)
        batch, broken = _batch(rng, base, count)
        data, damaged, base = data + batch, damaged or broken, base + max(count, 1)
    if rng.random() < 0.15:
        data = mutated(rng, data, data)
    return RecordSet(data, position, damaged)


def _batch(rng: random.Random, base: int, count: int) -> tuple[bytes, bool]:
    section = b"".join(_record(rng, delta) for delta in range(count))
    if rng.random() < 0.6:
        section = mutated(rng, section, section)
    codec = rng.choice((0, 0, 0, 0, 1, 2, 3, 4))
    body = bytes(_PACKERS[codec](section)) if codec else section
    damaged = bool(codec) and rng.random() < 0.2
    if damaged:
        body = mutated(rng, body, body)
    # Attributes, last offset delta, base and greatest timestamp, producer id, its epoch, its sequence, records.
    fields = [codec, max(count - 1, 0), 1_700_000_000_000, 1_700_000_000_099, -1, -1, -1, count]
    if rng.random() < 0.3:
        _mutate_fields(rng, fields)
        damaged = damaged or (fields[0] & 7) not in (0, codec)
    return _sealed(base, fields, body), damaged


def _mutate_fields(rng: random.Random, fields: list[int]) -> None:
    match rng.randrange(5):
        case 0:
            fields[0] ^= 1 << rng.randrange(8)
        case 1:
            fields[1] = rng.choice((fields[1] - 1, fields[1] + 1, -1, (1 << 31) - 1, fields[1] + 30))
        case 2:
            fields[2] = rng.choice((0, -1, (1 << 63) - 1, -(1 << 63)))
        case 3:
            fields[3] = rng.choice((0, -1, (1 << 63) - 1, -(1 << 63)))
        case 4:
            fields[7] = rng.choice((fields[7] - 1, fields[7] + 1, -1, 0, (1 << 31) - 1))


def _sealed(base: int, fields: list[int], body: bytes) -> bytes:
    covered = struct.pack(">hiqqqhii", *fields) + body
    return struct.pack(">qiibI", base, len(covered) + 9, -1, 2, google_crc32c.value(covered)) + covered


def _record(rng: random.Random, delta: int) -> bytes:
    headers = [(rng.choice((b"", b"h", "ä".encode())), _octets(rng)) for _ in range(rng.choice((0, 0, 0, 1, 3)))]
    body = b"\0" + varint(rng.choice((0, 1, -5, 1 << 40))) + varint(delta) + _text(_octets(rng)) + _text(_octets(rng))
    body += varint(len(headers)) + b"".join(_text(name) + _text(value) for name, value in headers)
    if rng.random() < RECORD_MUTATED:
        body = mutated(rng, body, body)  # and with its right length: what lies inside must fill it
    return varint(len(body)) + body


def _octets(rng: random.Random) -> bytes | None:
    return None if rng.random() < 0.15 else rng.randbytes(rng.choice((0, 1, 2, 8, 30, 70)))


def _text(data: bytes | None) -> bytes:
    return varint(-1) if data is None else varint(len(data)) + data


def judge_set(given: RecordSet) -> tuple[bool, str | None]:
    """Whether the set was refused, and what is wrong with that or with what was read."""
    again = _read_in_guarded_memory(given)
    try:
        batch = parse(_TP, given.data, position=Offset(given.position))
    except CorruptBatch as error:
        if again is not None:
            return True, "was refused, and is read in other memory"
        return True, None if given.damaged or _refused_plainly(given) else f"was refused ({error.what})"
    wrong = _outside(batch)
    if wrong is None and again != batch.offsets.tolist():
        wrong = "is read differently in other memory"
    if wrong is None and not given.damaged:
        wrong = _difference(batch, given)
    return False, wrong


def _refused_plainly(given: RecordSet) -> bool:
    try:
        read_plainly(given.data, given.position)
    except Refused:
        return True
    return False


def _difference(batch: RawBatch, given: RecordSet) -> str | None:
    try:
        rows, position = read_plainly(given.data, given.position)
    except Refused:
        return "was read, and is to be refused"
    if batch.next_position != position:
        return f"goes on at {batch.next_position} instead of {position}"
    found = [
        PlainRow(int(batch.offsets[i]), int(batch.timestamps[i]), batch.key(i), batch.value(i), batch.headers(i))
        for i in range(len(batch))
    ]
    if found != rows:
        return f"holds {found}, read plainly {rows}"
    return None


def _outside(batch: RawBatch) -> str | None:
    """Every span lies in the buffer, before its slack, and offsets grow."""
    end = len(batch.buffer) - BUFFER_SLACK
    for start, length in ((batch.key_start, batch.key_len), (batch.value_start, batch.value_len)):
        if not ((start >= 0) & (length >= -1) & (start + np.maximum(length, 0) <= end)).all():
            return "has a span outside of its buffer"
    if not ((batch.headers_start >= 0) & (batch.headers_start < batch.headers_end) & (batch.headers_end <= end)).all():
        return "has headers outside of its buffer"
    return None if (np.diff(batch.offsets) > 0).all() else "has offsets that do not grow"


def _read_in_guarded_memory(given: RecordSet) -> list[int] | None:
    """The offsets that the second half of `parse` finds with the unpacked bytes up against a page that cannot be read,
    None if it refuses them."""
    try:
        walk = recordbatch._Walk(_TP, given.data, given.position, ())
    except CorruptBatch:
        return None
    sections = np.array(walk.sections, np.int64).reshape(-1, recordbatch._SECTION_FIELDS)
    buffer = guarded(walk.unpacked.taken(), at_end=True)
    columns = np.empty((recordbatch._COLUMNS, int(sections[:, 2].sum())), np.int64)
    written, bad = recordbatch._read(buffer, sections, given.position, columns)
    return columns[0, :written].tolist() if bad < 0 else None
