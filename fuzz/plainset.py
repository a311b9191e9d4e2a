"""A plain reading of Kafka record sets, of well-formed and other ones: the twin of `avro.recordbatch.parse`.

Written from the format's page (https://kafka.apache.org/documentation/#recordbatch), a record at a time on Python's
integers. It knows no aborted transactions.
"""

from __future__ import annotations

import gzip
import struct
from typing import Final, NamedTuple

import cramjam
import google_crc32c
import lz4.frame

__all__ = ["HEAD", "PlainRow", "Refused", "read_plainly"]

HEAD: Final = struct.Struct(">qiibIhiqqqhii")
_AFTER_LENGTH: Final = 12
_APPEND_TIME, _CONTROL = 0x08, 0x20


class Refused(ValueError):
    """These bytes are no record set."""


class PlainRow(NamedTuple):
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


def read_plainly(data: bytes, position: int) -> tuple[list[PlainRow], int]:
    """Records at or after ``position``, and the position behind the last whole batch; raises `Refused`."""
    rows: list[PlainRow] = []
    wanted, at, before = position, 0, 0
    while len(data) - at > 16:  # up to the magic byte; less is the rest of a batch that was cut off
        length = struct.unpack_from(">i", data, at + 8)[0]
        if data[at + 16] != 2 or length < HEAD.size - _AFTER_LENGTH:
            raise Refused
        end = at + _AFTER_LENGTH + length
        if end > len(data):
            break
        if struct.unpack_from(">q", data, at)[0] < before:
            raise Refused  # batches do not overlap
        before = _batch(data[at:end], wanted, rows)
        position, at = max(position, before), end
    return rows, position


def _batch(batch: bytes, wanted: int, rows: list[PlainRow]) -> int:
    """Adds the batch's records; returns the offset behind its last one."""
    (base, _, _, _, crc, attributes, last_delta, first_ms, most_ms, _, _, _, count) = HEAD.unpack_from(batch)
    last = base + last_delta
    if base < 0 or last_delta < 0 or last >= 1 << 63:
        raise Refused
    if last < wanted:
        return int(last) + 1
    if google_crc32c.value(batch[21:]) != crc:
        raise Refused
    if not attributes & _CONTROL:
        section = _unpacked(batch[HEAD.size :], attributes & 7)
        if not 0 <= count <= len(section):
            raise Refused
        read = _Section(section, base, last_delta, most_ms if attributes & _APPEND_TIME else first_ms)
        read.stamped = not attributes & _APPEND_TIME
        rows += [row for row in read.records(count) if row.offset >= wanted]
    return int(last) + 1


def _unpacked(body: bytes, codec: int) -> bytes:
    if codec > 4:
        raise Refused
    if codec == 2:
        return bytes(cramjam.snappy.decompress_raw(body))
    return bytes({0: bytes, 1: gzip.decompress, 3: lz4.frame.decompress, 4: cramjam.zstd.decompress}[codec](body))


class _Section:
    """The records of one batch, read one after the other; none may look beyond its own end."""

    def __init__(self, data: bytes, base: int, last_delta: int, timestamp: int) -> None:
        self.data, self.at, self.stop = data, 0, len(data)
        self.base, self.last_delta, self.timestamp, self.stamped = base, last_delta, timestamp, True

    def records(self, count: int) -> list[PlainRow]:
        rows, before = [], -1
        for _ in range(count):
            self.stop = len(self.data)
            length = self.varint()
            if not 1 <= length <= self.stop - self.at:
                raise Refused
            self.stop = self.at + length
            self.at += 1  # attributes: none is in use
            since, delta = self.varint(), self.varint()
            if not before < delta <= self.last_delta:
                raise Refused
            before = delta
            rows.append(PlainRow(self.base + delta, self.moment(since), self.text(), self.text(), self.headers()))
            if self.at != self.stop:
                raise Refused
        if self.at != len(self.data):
            raise Refused
        return rows

    def moment(self, since: int) -> int:
        """64 bits, as a Java long: a sum beyond them wraps around."""
        moment = self.timestamp + since * self.stamped
        return (moment + (1 << 63)) % (1 << 64) - (1 << 63)

    def headers(self) -> tuple[tuple[str, bytes | None], ...]:
        found = []
        if (count := self.varint()) < 0:
            raise Refused
        for _ in range(count):
            if (name := self.text()) is None:
                raise Refused
            found.append((name.decode("utf-8", "replace"), self.text()))
        return tuple(found)

    def text(self) -> bytes | None:
        if (size := self.varint()) < 0:
            return None
        if size > self.stop - self.at:
            raise Refused
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            if self.at >= self.stop or shift > 63:
                raise Refused
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        if value >= 1 << 64:
            raise Refused
        return (value >> 1) ^ -(value & 1)
