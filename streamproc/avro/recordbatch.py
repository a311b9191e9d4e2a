"""Kafka's record batch, format v2: bytes to columns of spans and back. Both transports keep and carry these bytes.

Layout: https://kafka.apache.org/documentation/#recordbatch. Reading is one walk over the batch headers in Python and
one compiled pass over all records of a record set; both treat the bytes as hostile: no length is believed before it is
held against the end of what it must lie in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast

import cramjam
import google_crc32c
import lz4.frame
import numpy as np
from numba import njit

from streamproc.core.batch import BUFFER_SLACK, I64, U8, Headers, RawBatch
from streamproc.core.errors import WorkerFailure, invariant
from streamproc.core.limits import DECOMPRESSED_BATCH_BYTES_MAX, INTERNAL_BATCH_BYTES_MAX
from streamproc.core.types import Offset, TopicPartition

__all__ = [
    "BatchHeader",
    "Columns",
    "CorruptBatch",
    "RecordLike",
    "Spans",
    "build",
    "build_columns",
    "control_marker",
    "cut",
    "parse",
    "read_header",
    "rewrite",
    "spans",
    "split_build",
    "warm_up",
]

_HEAD: Final = struct.Struct(">qiibIhiqqqhii")
_TAIL: Final = struct.Struct(">hiqqqhii")
"""What the CRC covers of the header: from the attributes on."""
_CRC_FROM: Final = 21
_LENGTH_FROM: Final = 12
_MAGIC_AT: Final = 16
_RECORD_BYTES_MIN: Final = 7
"""Length, attributes, timestamp, offset, key length, value length and header count, one byte each."""
_RECORD_BYTES_EXTRA: Final = 32
"""More than the varints and the attributes of a record can take."""
_COMPRESS_BYTES_MIN: Final = 256
"""Below it lz4's frame costs more than it saves."""
_CODEC, _APPEND_TIME, _TRANSACTIONAL, _CONTROL = 0x07, 0x08, 0x10, 0x20
_LZ4: Final = 3
_LZ4_LEVEL: Final = -4
"""Below 0 lz4 looks for repetitions at fewer places: of orders, 42 % less time for 8 % more bytes than at 0."""
_LIKELY_RATIO: Final = 3
"""Of unpacked bytes to those on the wire."""
_XERIAL: Final = b"\x82SNAPPY\x00"
_SECTION_FIELDS: Final = 7
_COLUMNS: Final = 8

_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(function: _F) -> _F:
    return cast(_F, njit(cache=True, nogil=True)(function))


class CorruptBatch(WorkerFailure):
    """The log holds bytes that are no record batch: skipping them silently would lose records, so the worker stops."""

    def __init__(self, tp: TopicPartition, base_offset: int, what: str) -> None:
        super().__init__(
            f"The record batch at offset {base_offset} of {tp.topic}[{tp.partition}] is corrupt: {what}. Restore the "
            "partition from a replica or a backup, or delete the records up to it (kafka-delete-records.sh) and start "
            "anew with `streamproc reset MODULE`."
        )
        self.tp, self.base_offset, self.what = tp, base_offset, what


class BatchHeader(NamedTuple):
    """The fixed part of a batch, as it stands in its bytes."""

    base_offset: int
    length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_delta: int
    base_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    records: int

    @property
    def last_offset(self) -> int:
        return self.base_offset + self.last_delta

    @property
    def control(self) -> bool:
        return bool(self.attributes & _CONTROL)

    @property
    def transactional(self) -> bool:
        return bool(self.attributes & _TRANSACTIONAL)


class RecordLike(Protocol):
    """What is written: `transport.contract.OutRecord`, named here by shape because the transport lies above."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def timestamp_ms(self) -> int | None: ...


class Spans(NamedTuple):
    """A column of byte strings: places in one buffer; a length of -1 is a null."""

    buffer: U8
    start: I64
    length: I64


class Columns(NamedTuple):
    """Records as columns. A sequence of records whose attribute ``parts`` are such, one behind the other
    (`transport.contract.OutColumns`), is built into batches without an object per record."""

    keys: Spans
    values: Spans
    headers: Spans
    """Encoded, with their count in front; an empty span is 'no headers'."""
    timestamps: I64

    @classmethod
    def of(cls, batch: RawBatch, rows: I64) -> Columns:
        """The given ``rows`` of ``batch``, whose buffer they share."""
        return cls(
            Spans(batch.buffer, batch.key_start[rows], batch.key_len[rows]),
            Spans(batch.buffer, batch.value_start[rows], batch.value_len[rows]),
            Spans(batch.buffer, batch.headers_start[rows], batch.headers_end[rows] - batch.headers_start[rows]),
            np.ascontiguousarray(batch.timestamps[rows]),
        )

    def part(self, cut: slice | I64) -> Columns:
        """Some of the records, by a slice or by their places in whatever order; of the same buffers."""
        keys, values, headers = (Spans(s.buffer, s.start[cut], s.length[cut]) for s in self[:3])
        return Columns(keys, values, headers, self.timestamps[cut])


def read_header(data: bytes, at: int = 0) -> BatchHeader:
    """The header of the batch that starts at ``at``; the caller knows that 61 bytes are there."""
    return BatchHeader._make(_HEAD.unpack_from(data, at))


# --- writing ------------------------------------------------------------


def build(
    records: Sequence[RecordLike],
    *,
    base_offset: int = 0,
    producer_id: int = -1,
    producer_epoch: int = -1,
    base_sequence: int = -1,
    transactional: bool = False,
    now_ms: int,
    compress: bool = True,
) -> bytes:
    """All ``records`` (at least one) as one batch of whatever size. ``compress``: lz4 where that makes it smaller."""
    invariant(records, "A record batch cannot be built of no records.")
    head = _Producer(producer_id, producer_epoch, base_sequence, transactional, compress)
    return _one(_parts(records, now_ms), base_offset, head)


def split_build(
    records: Sequence[RecordLike],
    *,
    base_offset: int = 0,
    producer_id: int = -1,
    producer_epoch: int = -1,
    base_sequence: int = -1,
    transactional: bool = False,
    now_ms: int,
    compress: bool = True,
    bytes_max: int = INTERNAL_BATCH_BYTES_MAX,
) -> list[bytes]:
    """``records`` as consecutive batches below ``bytes_max`` each before compression; a larger record gets its own."""
    if not records:
        return []
    head = _Producer(producer_id, producer_epoch, base_sequence, transactional, compress)
    if len(records) == 1:
        return [_alone(records[0], base_offset, head, now_ms)]
    return _split(_parts(records, now_ms), base_offset, head, bytes_max)


def build_columns(
    keys: Spans,
    values: Spans,
    timestamps: I64,
    *,
    base_offset: int = 0,
    producer_id: int = -1,
    producer_epoch: int = -1,
    base_sequence: int = -1,
    transactional: bool = False,
    compress: bool = True,
    bytes_max: int = INTERNAL_BATCH_BYTES_MAX,
) -> list[bytes]:
    """As `split_build`, of columns, without headers: for writers that never made a Python object per record."""
    count = len(timestamps)
    if not count:
        return []
    none = Spans(np.zeros(1, np.uint8), np.zeros(count, np.int64), np.zeros(count, np.int64))
    head = _Producer(producer_id, producer_epoch, base_sequence, transactional, compress)
    return _split([Columns(keys, values, none, timestamps)], base_offset, head, bytes_max)


def control_marker(
    commit: bool,
    producer_id: int,
    producer_epoch: int,
    *,
    base_offset: int = 0,
    now_ms: int,
    coordinator_epoch: int = 0,
) -> bytes:
    """The control batch that ends a transaction in one partition; it takes one offset."""
    key, value = struct.pack(">hh", 0, int(commit)), struct.pack(">hi", 0, coordinator_epoch)
    body = b"\0\0\0" + bytes((len(key) << 1,)) + key + bytes((len(value) << 1,)) + value + b"\0"
    section = bytes((len(body) << 1,)) + body
    return _seal(section, _TRANSACTIONAL | _CONTROL, base_offset, 0, now_ms, now_ms, producer_id, producer_epoch, -1, 1)


def rewrite(batch: RawBatch, rows: I64, last_offset: int) -> bytes:
    """The given ``rows`` (at least one, ascending) as a batch that keeps their offsets and ends at ``last_offset``."""
    offsets = batch.offsets[rows]
    base = int(offsets[0])
    head = _Producer(-1, -1, -1, False, True)
    return _one([Columns.of(batch, rows)], base, head, deltas=offsets - base, last_delta=last_offset - base)


class _Producer(NamedTuple):
    producer_id: int
    epoch: int
    base_sequence: int
    transactional: bool
    compress: bool


def _parts(records: Sequence[RecordLike], now_ms: int) -> Sequence[Columns]:
    if (made := getattr(records, "parts", None)) is not None:
        return cast(Sequence[Columns], made)
    stamps = [record.timestamp_ms for record in records]
    return [
        Columns(
            spans([record.key for record in records]),
            spans([record.value for record in records]),
            spans(_encoded_headers(records)),
            np.array([now_ms if stamp is None else stamp for stamp in stamps], np.int64),
        )
    ]


def spans(values: Sequence[bytes | None]) -> Spans:
    """Byte strings as a column, one behind the other; writable, as every buffer is that a kernel is given."""
    try:
        length = np.fromiter(map(len, cast(Sequence[bytes], values)), np.int64, len(values))
        joined = bytearray().join(cast(Sequence[bytes], values))
    except TypeError:  # a null among them
        length = np.array([-1 if value is None else len(value) for value in values], np.int64)
        joined = bytearray().join([value or b"" for value in values])
    start = np.zeros(len(values), np.int64)
    np.cumsum(np.maximum(length[:-1], 0), out=start[1:])
    joined.append(0)  # numpy takes no view of nothing
    return Spans(np.frombuffer(joined, np.uint8), start, length)


def _encoded_headers(records: Sequence[RecordLike]) -> list[bytes]:
    """Neighbours that share one tuple, as an epoch's changelog records do, share its bytes."""
    encoded: list[bytes] = []
    last: Headers = ()
    data = b""
    for record in records:
        if record.headers is not last:
            last = record.headers
            data = _encode_headers(last) if last else b""
        encoded.append(data)
    return encoded


def _encode_headers(headers: Headers) -> bytes:
    parts = [_encode_varint(len(headers))]
    for name, value in headers:
        encoded = name.encode()
        parts += (_encode_varint(len(encoded)), encoded)
        parts += (_encode_varint(-1),) if value is None else (_encode_varint(len(value)), value)
    return b"".join(parts)


def _encode_varint(value: int) -> bytes:
    rest = (value << 1) ^ (value >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _size_bounds(columns: Columns) -> I64:
    lengths = (columns.keys.length, columns.values.length, columns.headers.length)
    return cast(I64, sum(np.maximum(length, 0) for length in lengths) + _RECORD_BYTES_EXTRA)


def _split(parts: Sequence[Columns], base_offset: int, head: _Producer, bytes_max: int) -> list[bytes]:
    ends = np.cumsum(np.concatenate([_size_bounds(part) for part in parts]))
    batches, lo, count = [], 0, len(ends)
    while lo < count:
        begun = int(ends[lo - 1]) if lo else 0
        hi = max(lo + 1, int(np.searchsorted(ends, begun + bytes_max - _HEAD.size, "right")))
        sequence = head.base_sequence + lo if head.base_sequence >= 0 else -1
        batches.append(_one(cut(parts, lo, hi), base_offset + lo, head._replace(base_sequence=sequence)))
        lo = hi
    return batches


def cut(parts: Sequence[Columns], lo: int, hi: int) -> list[Columns]:
    """Records ``lo`` to ``hi`` (exclusive) of the ``parts``, counted through; of the same buffers."""
    found, at = [], 0
    for part in parts:
        count = len(part.timestamps)
        if lo < at + count and at < hi:
            found.append(part.part(slice(max(lo - at, 0), hi - at)))
        at += count
    return found


def _one(
    parts: Sequence[Columns],
    base_offset: int,
    head: _Producer,
    *,
    deltas: I64 | None = None,
    last_delta: int | None = None,
) -> bytes:
    out = np.empty(sum(int(_size_bounds(part).sum()) for part in parts), np.uint8)
    first, at, count = int(parts[0].timestamps[0]), 0, 0
    for keys, values, headers, timestamps in parts:
        upto = count + len(timestamps)
        steps = np.arange(count, upto, dtype=np.int64) if deltas is None else deltas[count:upto]
        at = _write(out, at, steps, timestamps - first, *keys, *values, *headers)
        count = upto
    section, attributes = _packed(out[:at].data, head)
    return _seal(
        section, attributes, base_offset, count - 1 if last_delta is None else last_delta, first,
        max(int(part.timestamps.max()) for part in parts), head.producer_id, head.epoch, head.base_sequence, count,
    )  # fmt: skip


def _alone(record: RecordLike, base_offset: int, head: _Producer, now_ms: int) -> bytes:
    """The batch of one record, as `_one` makes it of columns, which for so little cost ten times as much: a task tells its
    watermark to every partition of a table at every commit."""
    parts = [b"\0\0\0"]  # attributes, and no difference to the batch's time and offset
    for text in (record.key, record.value):
        parts += (_encode_varint(-1),) if text is None else (_encode_varint(len(text)), text)
    parts.append(_encode_headers(record.headers) if record.headers else b"\0")
    body = b"".join(parts)
    section, attributes = _packed(_encode_varint(len(body)) + body, head)
    stamp = now_ms if record.timestamp_ms is None else record.timestamp_ms
    return _seal(section, attributes, base_offset, 0, stamp, stamp, head.producer_id, head.epoch, head.base_sequence, 1)


def _packed(section: bytes | memoryview, head: _Producer) -> tuple[bytes, int]:
    """Records as the batch holds them, and the batch's attributes."""
    attributes = _TRANSACTIONAL if head.transactional else 0
    if head.compress and len(section) >= _COMPRESS_BYTES_MIN:
        # A broker takes no linked blocks (KIP-57).
        smaller = lz4.frame.compress(section, compression_level=_LZ4_LEVEL, block_linked=False, store_size=False)
        if len(smaller) < len(section):
            return smaller, attributes | _LZ4
    return bytes(section), attributes


def _seal(
    section: bytes,
    attributes: int,
    base_offset: int,
    last_delta: int,
    base_timestamp: int,
    max_timestamp: int,
    producer_id: int,
    producer_epoch: int,
    base_sequence: int,
    count: int,
) -> bytes:
    head = _TAIL.pack(
        attributes, last_delta, base_timestamp, max_timestamp, producer_id, producer_epoch, base_sequence, count
    )
    size = len(head) + len(section) + _CRC_FROM - _LENGTH_FROM
    crc = google_crc32c.extend(google_crc32c.value(head), section)
    return b"".join((struct.pack(">qiibI", base_offset, size, -1, 2, crc), head, section))


@_compiled
def _put_varint(out: U8, at: int, value: int) -> int:
    rest = np.uint64((value << 1) ^ (value >> 63))
    while rest > np.uint64(0x7F):
        out[at] = np.uint8(rest & np.uint64(0x7F)) | np.uint8(0x80)
        rest >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(rest)
    return at + 1


@_compiled
def _varint_size(value: int) -> int:
    rest, size = np.uint64((value << 1) ^ (value >> 63)), 1
    while rest > np.uint64(0x7F):
        rest >>= np.uint64(7)
        size += 1
    return size


@_compiled
def _put_bytes(out: U8, at: int, buffer: U8, start: int, length: int) -> int:
    at = _put_varint(out, at, length)
    return _copy(out, at, buffer, start, max(length, 0))


@_compiled
def _copy(out: U8, at: int, buffer: U8, start: int, length: int) -> int:
    # Indexes that cannot be negative let the compiler make one block copy of the loop: a tenth of the time.
    to, source = np.uint64(at), np.uint64(start)
    for i in range(np.uint64(length)):
        out[to + i] = buffer[source + i]
    return at + length


@_compiled
def _write(
    out: U8, at: int, deltas: I64, sinces: I64, keys: U8, key_start: I64, key_len: I64, values: U8, value_start: I64,
    value_len: I64, headers: U8, headers_start: I64, headers_len: I64,
) -> int:  # fmt: skip
    """Write the records one behind the other into ``out``, from ``at`` on; it is long enough (`_size_bounds`). ``deltas``
    and ``sinces`` count from the batch's first offset and timestamp. Returns the end."""
    for i in range(len(deltas)):
        since = sinces[i]
        body = 1 + _varint_size(since) + _varint_size(deltas[i]) + max(headers_len[i], 1)
        body += _varint_size(key_len[i]) + max(key_len[i], 0) + _varint_size(value_len[i]) + max(value_len[i], 0)
        at = _put_varint(out, at, body)
        out[at] = 0
        at = _put_varint(out, at + 1, since)
        at = _put_varint(out, at, deltas[i])
        at = _put_bytes(out, at, keys, key_start[i], key_len[i])
        at = _put_bytes(out, at, values, value_start[i], value_len[i])
        if headers_len[i] <= 0:
            out[at] = 0
            at += 1
        at = _copy(out, at, headers, headers_start[i], max(headers_len[i], 0))
    return at


# --- reading ------------------------------------------------------------


def parse(tp: TopicPartition, data: bytes, *, position: Offset, aborted: Iterable[tuple[int, int]] = ()) -> RawBatch:
    """All readable records at or after ``position`` of a record set, which may end in a batch that was cut off.

    ``aborted`` are the fetch's aborted transactions (producer id, first offset): their records are dropped, as are
    control batches. ``next_position`` lies behind the last whole batch, whether or not anything of it was readable;
    what comes after `DECOMPRESSED_BATCH_BYTES_MAX` of unpacked bytes is left for the next fetch. Raises `CorruptBatch`.
    """
    walk = _Walk(tp, data, position, aborted)
    sections = np.array(walk.sections, np.int64).reshape(-1, _SECTION_FIELDS)
    buffer = walk.unpacked.taken()
    columns = np.empty((_COLUMNS, int(sections[:, 2].sum())), np.int64)
    written, bad = _read(buffer, sections, int(position), columns)
    if bad >= 0:
        raise CorruptBatch(tp, int(sections[bad, 3]), "a record does not fit into its batch")
    c = columns[:, :written]
    return RawBatch(tp, buffer, c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], Offset(walk.position))


class _Walk:
    """A pass over the batch headers: what is to be read (``sections`` of what is ``unpacked``) and how far it goes."""

    def __init__(self, tp: TopicPartition, data: bytes, position: int, aborted: Iterable[tuple[int, int]]) -> None:
        self.tp, self.position = tp, position
        self.sections: list[tuple[int, ...]] = []
        self.unpacked = _Unpacked(_LIKELY_RATIO * len(data))
        self._pending = sorted(aborted, key=lambda entry: entry[1], reverse=True)
        self._gone: set[int] = set()
        self._batch_before_ends = 0
        view, at = np.frombuffer(data or b"\0", np.uint8), 0
        while self.unpacked.size < DECOMPRESSED_BATCH_BYTES_MAX and (end := self._batch_end(data, at)) is not None:
            self._visit(read_header(data, at), view[at:end], position)
            at = end

    def _batch_end(self, data: bytes, at: int) -> int | None:
        """End of the batch at ``at``, None if the rest is no whole one: a broker cuts the last batch of an answer."""
        if len(data) - at <= _MAGIC_AT:
            return None
        base_offset, length = struct.unpack_from(">qi", data, at)
        if data[at + _MAGIC_AT] != 2:
            raise CorruptBatch(self.tp, base_offset, f"its format is {data[at + _MAGIC_AT]}, only 2 is supported")
        if length < _HEAD.size - _LENGTH_FROM:
            raise CorruptBatch(self.tp, base_offset, f"it says to be {length} bytes long")
        end = at + _LENGTH_FROM + int(length)
        return end if end <= len(data) else None

    def _visit(self, head: BatchHeader, batch: U8, wanted: int) -> None:
        if head.base_offset < 0 or head.last_delta < 0 or head.last_offset >= 1 << 63:
            raise CorruptBatch(self.tp, head.base_offset, f"it says to end {head.last_delta} offsets later")
        # The base offset is outside of the checksum: a wrong one would move records, and the position, in silence.
        if head.base_offset < self._batch_before_ends:
            raise CorruptBatch(
                self.tp, head.base_offset, f"the batch before it ends at offset {self._batch_before_ends - 1}"
            )
        self._batch_before_ends = head.last_offset + 1
        while self._pending and self._pending[-1][1] <= head.last_offset:
            self._gone.add(self._pending.pop()[0])
        if head.last_offset >= wanted:
            if google_crc32c.value(batch[_CRC_FROM:]) != head.crc:
                raise CorruptBatch(self.tp, head.base_offset, "its checksum is wrong")
            if not head.control and not (head.transactional and head.producer_id in self._gone):
                self._take(head, batch[_HEAD.size :])
        if head.control:
            # Its own abort marker is the next that a producer in `gone` can be seen with.
            self._gone.discard(head.producer_id)
        self.position = max(self.position, head.last_offset + 1)

    def _take(self, head: BatchHeader, body: U8) -> None:
        begin, end = self.unpacked.size, self._unpack(head, body)
        if not 0 <= head.records <= (end - begin) // _RECORD_BYTES_MIN:
            raise CorruptBatch(
                self.tp, head.base_offset, f"it says to hold {head.records} records in {end - begin} bytes"
            )
        append_time = head.attributes & _APPEND_TIME
        timestamp = head.max_timestamp if append_time else head.base_timestamp
        self.sections.append(
            (begin, end, head.records, head.base_offset, head.last_delta, timestamp, 0 if append_time else 1)
        )

    def _unpack(self, head: BatchHeader, body: U8) -> int:
        codec, unpacked = head.attributes & _CODEC, self.unpacked
        into = {1: cramjam.gzip.decompress_into, 3: cramjam.lz4.decompress_into, 4: cramjam.zstd.decompress_into}
        try:
            if codec in into:
                return unpacked.inflate(into[codec], body)
            if codec in (0, 2):
                return unpacked.add(_unsnappy(body.tobytes()) if codec else body)
        except (cramjam.DecompressionError, ValueError) as error:
            raise CorruptBatch(self.tp, head.base_offset, f"it cannot be decompressed ({error})") from error
        raise CorruptBatch(self.tp, head.base_offset, f"its compression {codec} is unknown")


class _Unpacked:
    """Batches unpacked one behind the other into one buffer, which grows as it must; memory that is not written to costs
    nothing."""

    def __init__(self, likely_bytes: int) -> None:
        self.size = 0
        self._buffer = np.empty(likely_bytes + BUFFER_SLACK, np.uint8)

    def add(self, body: U8 | bytes) -> int:
        """A batch that was not compressed; returns where it ends."""
        end = self.size + len(body)
        self._room(end)
        self._buffer[self.size : end] = np.frombuffer(body, np.uint8)
        self.size = end
        return end

    def inflate(self, decompress_into: Callable[[Any, Any], int], body: U8) -> int:
        """A compressed batch of no more than `DECOMPRESSED_BATCH_BYTES_MAX`; returns where it ends."""
        most = self.size + DECOMPRESSED_BATCH_BYTES_MAX
        while True:
            stop = min(len(self._buffer) - BUFFER_SLACK, most)
            try:
                self.size += decompress_into(body, self._buffer[self.size : stop])
                return self.size
            except cramjam.DecompressionError:  # corrupt, or only too long
                if stop == most:
                    raise
                self._room(min(2 * len(self._buffer), most))

    def taken(self) -> U8:
        """All of it, with `BUFFER_SLACK` behind."""
        self._buffer[self.size : self.size + BUFFER_SLACK] = 0
        return self._buffer[: self.size + BUFFER_SLACK]

    def _room(self, size: int) -> None:
        if size + BUFFER_SLACK > len(self._buffer):
            wider = np.empty(size + BUFFER_SLACK, np.uint8)
            wider[: self.size] = self._buffer[: self.size]
            self._buffer = wider


def _unsnappy(body: bytes) -> bytes:
    """Raw snappy, or the blocks of Java's xerial library: 16 bytes of header, then (length, raw block) each."""
    if not body.startswith(_XERIAL):
        return _unsnappy_raw(body, DECOMPRESSED_BATCH_BYTES_MAX)
    parts, at, left = [], 16, DECOMPRESSED_BATCH_BYTES_MAX
    while at < len(body):
        size = int.from_bytes(body[at : at + 4], "big", signed=True)
        if at + 4 > len(body) or not 0 < size <= len(body) - at - 4:
            raise ValueError(f"a snappy block of {size} bytes does not fit")
        parts.append(_unsnappy_raw(body[at + 4 : at + 4 + size], left))
        left -= len(parts[-1])
        at += 4 + size
    return b"".join(parts)


def _unsnappy_raw(body: bytes, bytes_max: int) -> bytes:
    if (size := cramjam.snappy.decompress_raw_len(body)) > bytes_max:
        raise ValueError(f"{size} bytes are more than the limit of {DECOMPRESSED_BATCH_BYTES_MAX}")
    return bytes(cramjam.snappy.decompress_raw(body))


@_compiled
def _get_varint(buffer: U8, at: int, end: int) -> tuple[int, int]:
    """Value and next place; the place is -1 if the varint does not end before ``end`` or is longer than 64 bits."""
    raw, shift = np.uint64(0), 0
    while at < end and shift < 70:
        byte = buffer[at]
        at += 1
        if shift == 63 and byte > 1:
            return 0, -1
        raw |= np.uint64(byte & 0x7F) << np.uint64(shift)
        if byte < 0x80:
            return np.int64(raw >> np.uint64(1)) ^ -np.int64(raw & np.uint64(1)), at  # type: ignore[return-value]
        shift += 7
    return 0, -1


@_compiled
def _get_bytes(buffer: U8, at: int, end: int) -> tuple[int, int, int]:
    """Start, length (-1: null) and next place (-1: does not fit)."""
    length, at = _get_varint(buffer, at, end)
    if at < 0 or length > end - at:
        return 0, 0, -1
    if length < 0:
        return at, -1, at
    return at, length, at + length


@_compiled
def _skip_headers(buffer: U8, at: int, end: int) -> int:
    count, at = _get_varint(buffer, at, end)
    if at < 0 or count < 0 or count > end - at:
        return -1
    for _ in range(count):
        _, length, at = _get_bytes(buffer, at, end)
        if at < 0 or length < 0:
            return -1
        _, length, at = _get_bytes(buffer, at, end)
        if at < 0:
            return -1
    return at


@_compiled
def _read(buffer: U8, sections: I64, position: int, columns: I64) -> tuple[int, int]:
    """Spans of every record at or after ``position``; how many, and the section that does not fit (-1: none)."""
    written = 0
    for s in range(len(sections)):
        at, end, count, base_offset, last_delta, timestamp, stamped = sections[s]
        before = -1
        for _ in range(count):
            length, at = _get_varint(buffer, at, end)
            if at < 0 or length < 1 or length > end - at:
                return written, s
            stop = at + length
            since, at = _get_varint(buffer, at + 1, stop)
            if at < 0:
                return written, s
            delta, at = _get_varint(buffer, at, stop)
            if at < 0 or delta <= before or delta > last_delta:
                return written, s
            before = delta
            key_start, key_len, at = _get_bytes(buffer, at, stop)
            if at < 0:
                return written, s
            value_start, value_len, at = _get_bytes(buffer, at, stop)
            if at < 0:
                return written, s
            if _skip_headers(buffer, at, stop) != stop:
                return written, s
            if base_offset + delta >= position:
                columns[0, written] = base_offset + delta
                columns[1, written] = timestamp + since * stamped
                columns[2, written] = key_start
                columns[3, written] = key_len
                columns[4, written] = value_start
                columns[5, written] = value_len
                columns[6, written] = at
                columns[7, written] = stop
                written += 1
            at = stop
        if at != end:
            return written, s
    return written, -1


class _Sample(NamedTuple):
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None


def warm_up() -> None:
    """Load (or, once per machine, compile) the kernels, so that no record waits for it: call at start, off its path."""
    parse(TopicPartition("warm-up", 0), build([_Sample(b"k", b"v", (), 0)], now_ms=0), position=Offset(0))
