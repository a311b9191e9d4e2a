"""Record batches against aiokafka's, against a plain reading of the format, and against hostile bytes."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cramjam
import google_crc32c
import numpy as np
import pytest
from aiokafka.record.default_records import (  # type: ignore[import-untyped]
    DefaultRecordBatch,
    DefaultRecordBatchBuilder,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.avro import recordbatch
from streamproc.avro.recordbatch import (
    CorruptBatch,
    Spans,
    build,
    build_columns,
    control_marker,
    parse,
    read_header,
    rewrite,
    split_build,
)
from streamproc.core.batch import BUFFER_SLACK, I64, Headers, RawBatch
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord

TP = TopicPartition("orders", 3)
GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4


class Row(NamedTuple):
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def rows_of(batch: RawBatch) -> list[Row]:
    return [
        Row(int(batch.offsets[i]), int(batch.timestamps[i]), batch.key(i), batch.value(i), batch.headers(i))
        for i in range(len(batch))
    ]


def expected(records: Sequence[OutRecord], base: int = 0, now_ms: int = 0) -> list[Row]:
    return [
        Row(base + i, now_ms if r.timestamp_ms is None else r.timestamp_ms, r.key, r.value, tuple(r.headers))
        for i, r in enumerate(records)
    ]


def parsed(data: bytes, position: int = 0, aborted: Sequence[tuple[int, int]] = ()) -> RawBatch:
    return parse(TP, data, position=Offset(position), aborted=aborted)


def read_plainly(data: bytes, position: int) -> list[Row]:
    """The twin: one record after the other, as the format's page tells it; uncompressed, well-formed batches only."""
    rows, at = [], 0
    while at < len(data):
        base, length = struct.unpack_from(">qi", data, at)
        base_timestamp, count = struct.unpack_from(">q", data, at + 27)[0], struct.unpack_from(">i", data, at + 57)[0]
        place = at + 61

        def varint() -> int:
            nonlocal place
            value = shift = 0
            while True:
                value |= (data[place] & 0x7F) << shift
                place, shift = place + 1, shift + 7
                if data[place - 1] < 0x80:
                    return (value >> 1) ^ -(value & 1)

        def text() -> bytes | None:
            nonlocal place
            if (size := varint()) < 0:
                return None
            place += size
            return data[place - size : place]

        for _ in range(count):
            varint()
            place += 1
            timestamp, offset = base_timestamp + varint(), base + varint()
            key, value = text(), text()
            headers = tuple(((text() or b"").decode(), text()) for _ in range(varint()))
            if offset >= position:
                rows.append(Row(offset, timestamp, key, value, headers))
        at += 12 + length
        assert place == at
    return rows


octets = st.one_of(st.none(), st.binary(max_size=40))
headers = st.lists(st.tuples(st.text(max_size=8), octets), max_size=3).map(tuple)
stamps = st.integers(min_value=-(2**40), max_value=2**45)
out_records = st.lists(st.builds(OutRecord, octets, octets, headers, stamps), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(out_records, st.integers(0, 2**40), st.booleans(), st.integers(0, 14))
def test_what_is_built_is_read_back_by_us_by_the_twin_and_by_aiokafka(
    records: list[OutRecord], base: int, compress: bool, skipped: int
) -> None:
    data = build(records, base_offset=base, now_ms=0, compress=compress)
    rows = expected(records, base)
    batch = parsed(data, base + skipped)
    assert rows_of(batch) == rows[skipped:]
    assert batch.next_position == base + max(len(records), skipped)
    if not compress:
        assert read_plainly(data, base + skipped) == rows[skipped:]
    theirs = DefaultRecordBatch(data)
    assert theirs.validate_crc()
    assert [Row(r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in theirs] == rows


@pytest.mark.parametrize("codec", [0, GZIP, SNAPPY, LZ4, ZSTD])
def test_batches_that_aiokafka_built_are_read_whole(codec: int) -> None:
    records = [OutRecord(f"k{i}".encode(), b"v" * i, (("h", b"x"),) if i % 3 else (), 1_000 + i) for i in range(300)]
    records[7] = OutRecord(None, None, (("null", None),), 5)
    data = b""
    for start in range(0, 300, 100):
        builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 20)
        for delta, record in enumerate(records[start : start + 100]):
            builder.append(delta, record.timestamp_ms, record.key, record.value, list(record.headers))
        data += struct.pack(">q", start) + bytes(builder.build())[8:]
    batch = parsed(data, 50)
    assert rows_of(batch) == expected(records)[50:]
    assert len(batch.buffer) >= int(batch.headers_end[-1]) + BUFFER_SLACK


@pytest.mark.parametrize("codec", [0, GZIP, SNAPPY, LZ4, ZSTD])
def test_batches_that_unpack_to_far_more_than_they_weigh_are_read_whole(codec: int) -> None:
    records = [OutRecord(b"%d" % i, b"v" * 20_000, (), i) for i in range(30)]
    data = b""
    for start in range(0, 30, 10):
        builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 20)
        for delta, record in enumerate(records[start : start + 10]):
            builder.append(delta, record.timestamp_ms, record.key, record.value, [])
        data += struct.pack(">q", start) + bytes(builder.build())[8:]
    batch = parsed(data)
    assert rows_of(batch) == expected(records)
    assert bytes(batch.buffer[-BUFFER_SLACK:]) == bytes(BUFFER_SLACK)


def test_the_header_says_who_produced_it() -> None:
    data = build(
        [OutRecord(b"k", b"v" * 1000, (), 7), OutRecord(b"k", b"v", (), 3)],
        base_offset=10, producer_id=5, producer_epoch=2, base_sequence=40, transactional=True, now_ms=0,
    )  # fmt: skip
    head = read_header(data)
    assert (head.base_offset, head.last_offset, head.records) == (10, 11, 2)
    assert (head.producer_id, head.producer_epoch, head.base_sequence) == (5, 2, 40)
    assert (head.base_timestamp, head.max_timestamp, head.transactional, head.control) == (7, 7, True, False)
    theirs = DefaultRecordBatch(data)
    assert (theirs.producer_id, theirs.producer_epoch, theirs.base_sequence) == (5, 2, 40)
    assert theirs.is_transactional


def test_a_record_without_timestamp_gets_the_moment_of_writing() -> None:
    assert parsed(build([OutRecord(b"k", b"v")], now_ms=123)).timestamps.tolist() == [123]


def test_splitting_keeps_batches_below_the_limit_and_a_larger_record_alone() -> None:
    rng = random.Random(1)
    records = [
        OutRecord(b"k", rng.randbytes(size), (), i) for i, size in enumerate([400, 300, 5_000, 10, 10, 900, 100])
    ]
    batches = split_build(
        records, base_offset=7, base_sequence=3, producer_id=1, producer_epoch=0, now_ms=0, bytes_max=1_024
    )
    assert [(read_header(b).base_offset, read_header(b).records) for b in batches] == [
        (7, 2),
        (9, 1),
        (10, 2),
        (12, 1),
        (13, 1),
    ]
    assert [read_header(b).base_sequence for b in batches] == [3, 5, 6, 8, 9]
    assert all(len(data) < 1_024 for data in batches if read_header(data).base_offset != 9)
    assert rows_of(parsed(b"".join(batches))) == expected(records, 7)
    assert split_build([], now_ms=0) == []


@given(
    st.none() | st.binary(max_size=300), st.none() | st.binary(max_size=2_000),
    st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=3).map(tuple),
    st.none() | st.integers(0, 1 << 41),
)  # fmt: skip
def test_a_record_alone_makes_the_batch_that_columns_make(
    key: bytes | None, value: bytes | None, headers: Headers, stamp: int | None
) -> None:
    record = OutRecord(key, value, headers, stamp)
    [alone] = split_build([record], producer_id=7, producer_epoch=2, base_sequence=5, transactional=True, now_ms=9)
    assert alone == build([record], producer_id=7, producer_epoch=2, base_sequence=5, transactional=True, now_ms=9)


def test_columns_build_what_records_build() -> None:
    records = [OutRecord(None if i % 5 == 0 else b"key%d" % i, b"v" * (i % 7), (), i) for i in range(100)]
    keys = b"".join(r.key or b"" for r in records)
    key_len = np.array([-1 if r.key is None else len(r.key) for r in records])
    values, value_len = b"".join(r.value or b"" for r in records), np.array([len(r.value or b"") for r in records])

    def spans(joined: bytes, length: I64) -> Spans:
        sizes = np.maximum(length, 0)
        return Spans(np.frombuffer(bytearray(joined), np.uint8), np.cumsum(sizes) - sizes, length)

    [built] = build_columns(spans(keys, key_len), spans(values, value_len), np.arange(100), base_offset=5)
    assert built == build(records, base_offset=5, now_ms=0)


def test_a_rewritten_batch_keeps_its_offsets_and_its_end() -> None:
    records = [OutRecord(b"k%d" % i, b"v%d" % i, (("h", b"%d" % i),), i) for i in range(6)]
    batch = parsed(build(records, base_offset=20, now_ms=0))
    data = rewrite(batch, np.array([1, 4]), 25)
    again = parsed(data)
    assert rows_of(again) == [expected(records, 20)[1], expected(records, 20)[4]]
    assert (again.next_position, read_header(data).base_offset) == (26, 21)


def test_markers_are_skipped_and_move_the_position() -> None:
    data = build([OutRecord(b"a", b"1")], now_ms=0) + control_marker(True, 9, 1, base_offset=1, now_ms=5)
    batch = parsed(data)
    assert (batch.offsets.tolist(), batch.next_position) == ([0], 2)
    theirs = DefaultRecordBatch(control_marker(False, 9, 1, base_offset=1, now_ms=5))
    assert theirs.is_control_batch
    assert theirs.validate_crc()
    assert [record.key for record in theirs] == [b"\0\0\0\0"]
    assert len(parsed(data, 2)) == 0


def transactional(producer_id: int, base: int, *values: str) -> bytes:
    records = [OutRecord(None, value.encode(), (), 0) for value in values]
    return build(records, base_offset=base, producer_id=producer_id, producer_epoch=0, transactional=True, now_ms=0)


def test_aborted_ranges_are_dropped_by_producer_between_first_offset_and_marker() -> None:
    # 0 a1 (committed before) | 1 b1 | 2 a2 aborted | 3 plain | 4 abort a | 5 a3 | 6 b2 | 7 commit b | 8 a4 aborted
    data = b"".join((
        transactional(1, 0, "a1"), transactional(2, 1, "b1"), transactional(1, 2, "a2"),
        build([OutRecord(None, b"plain", (), 0)], base_offset=3, producer_id=1, now_ms=0),
        control_marker(False, 1, 0, base_offset=4, now_ms=0), transactional(1, 5, "a3"), transactional(2, 6, "b2"),
        control_marker(True, 2, 0, base_offset=7, now_ms=0), transactional(1, 8, "a4"),
    ))  # fmt: skip
    batch = parsed(data, 0, [(1, 8), (1, 2)])
    assert [row.value for row in rows_of(batch)] == [b"a1", b"b1", b"plain", b"a3", b"b2"]
    assert batch.next_position == 9
    # A fetch that starts inside the aborted range is told of it by an earlier first offset.
    inside = data[len(transactional(1, 0, "a1")) + len(transactional(2, 1, "b1")) :]
    assert [row.value for row in rows_of(parsed(inside, 2, [(1, 0), (1, 8)]))] == [b"plain", b"a3", b"b2"]


def test_a_cut_last_batch_is_left_for_the_next_fetch() -> None:
    first, second = build([OutRecord(b"a", b"1")], now_ms=0), build([OutRecord(b"b", b"2")], base_offset=1, now_ms=0)
    for cut in range(len(second)):
        batch = parsed(first + second[:cut])
        assert (batch.offsets.tolist(), batch.next_position) == ([0], 1)
    assert parsed(b"", 5).next_position == 5


@pytest.mark.parametrize("base", [0, 29, 30, 31, 59])
def test_a_batch_that_begins_before_the_one_in_front_of_it_ends_is_refused(base: int) -> None:
    """Fuzz seeds 241 and 1349 of their time: a base offset is outside of the checksum, and an end may be a lie."""
    first = build([OutRecord(b"a", b"1"), OutRecord(b"b", b"2")], base_offset=30, now_ms=0)
    far = sealed(first[:23] + struct.pack(">i", 29) + first[27:])  # it says to end at 59
    with pytest.raises(CorruptBatch, match=f"at offset {base} of .*the batch before it ends at offset"):
        parsed(far + build([OutRecord(b"c", b"3")], base_offset=base, now_ms=0), 30)


def test_offset_gaps_of_compaction_are_passed_over() -> None:
    whole = parsed(build([OutRecord(b"k%d" % i, b"v", (), 0) for i in range(10)], now_ms=0))
    empty = bytearray(control_marker(True, 1, 0, base_offset=20, now_ms=0)[:61])
    empty[8:12], empty[21:23], empty[57:61] = struct.pack(">i", 49), b"\0\0", bytes(4)
    empty[17:21] = struct.pack(">I", google_crc32c.value(bytes(empty[21:])))
    batch = parsed(rewrite(whole, np.array([2, 5]), 9) + bytes(empty))
    assert (batch.offsets.tolist(), batch.next_position) == ([2, 5], 21)


def test_append_time_takes_the_time_of_the_batch() -> None:
    data = bytearray(build([OutRecord(b"k", b"v", (), 5), OutRecord(b"k", b"v", (), 9)], now_ms=0))
    data[22] |= 0x08
    data[35:43] = struct.pack(">q", 777)
    assert parsed(sealed(data)).timestamps.tolist() == [777, 777]


def sealed(data: bytes | bytearray) -> bytes:
    """With a right checksum, whatever else is wrong."""
    return bytes(data[:17]) + struct.pack(">I", google_crc32c.value(bytes(data[21:]))) + bytes(data[21:])


def with_section(section: bytes, *, codec: int = 0, count: int = 1, last_delta: int = 0) -> bytes:
    tail = struct.pack(">hiqqqhii", codec, last_delta, 0, 0, -1, -1, -1, count) + section
    return sealed(struct.pack(">qiibI", 40, len(tail) + 9, -1, 2, 0) + tail)


GOOD = b"\x10\0\0\0\x02k\x02v\0"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (build([OutRecord(b"k", b"v")], base_offset=40, now_ms=0)[:-1] + b"\xff", "checksum"),
        (with_section(GOOD)[:16] + b"\1" + with_section(GOOD)[17:], "format is 1"),
        (struct.pack(">qi", 40, 48) + with_section(GOOD)[12:], "48 bytes long"),
        (struct.pack(">qi", 40, -5) + with_section(GOOD)[12:], "-5 bytes long"),
        (with_section(GOOD, codec=5), "compression 5 is unknown"),
        (with_section(b"no lz4 at all", codec=LZ4), "cannot be decompressed"),
        (with_section(b"no gzip at all", codec=GZIP), "cannot be decompressed"),
        (with_section(b"\xff" * 9, codec=SNAPPY), "cannot be decompressed"),
        (with_section(b"\x82SNAPPY\0" + bytes(8) + struct.pack(">i", 99), codec=SNAPPY), "cannot be decompressed"),
        (with_section(b"\xff\xff\xff\xff\x7f" * 2, codec=SNAPPY), "cannot be decompressed"),
        (with_section(b"no zstd at all", codec=ZSTD), "cannot be decompressed"),
        (with_section(bytes(cramjam.zstd.compress(bytes(65 << 20))), codec=ZSTD), "cannot be decompressed"),
        (with_section(GOOD, count=2), "hold 2 records in 9 bytes"),
        (with_section(GOOD, count=-1), "hold -1 records"),
        (with_section(GOOD, count=2**31 - 1), "hold 2147483647 records"),
        (with_section(GOOD, last_delta=-1), "end -1 offsets later"),
        (with_section(GOOD + GOOD), "does not fit"),
        (with_section(GOOD + GOOD, count=2), "does not fit"),
        (with_section(b"\x12" + GOOD[1:]), "does not fit"),
        (with_section(b"\x0e" + GOOD[1:]), "does not fit"),
        (with_section(b"\x10\0\0\x02" + GOOD[4:]), "does not fit"),
        (with_section(b"\x10\0\0\0\x7ek\x02v\0"), "does not fit"),
        (with_section(b"\x10\0\0\0\x02k\x06v\0"), "does not fit"),
        (with_section(b"\x10\0\0\0\x02k\x02v\x02"), "does not fit"),
        (with_section(b"\x10\0\0\0\x02k\x02v\x01"), "does not fit"),
        (with_section(b"\x14\0\0\0\x02k\x02v\x02\x01\x01"), "does not fit"),
        (with_section(b"\xff" * 30), "does not fit"),
        (with_section(b"\x26\0" + b"\xff" * 9 + b"\x02\0\x02k\x02v\0\0\0"), "does not fit"),
    ],
)  # fmt: skip
def test_a_corrupt_batch_is_named_with_its_place_and_reason(data: bytes, said: str) -> None:
    with pytest.raises(CorruptBatch) as corrupt:
        parsed(data)
    assert all(word in str(corrupt.value) for word in ("orders[3]", "offset 40", said, "streamproc reset"))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_sections_are_refused_or_stay_within_their_batch(data: st.DataObject) -> None:
    """Bytes with a right checksum but changed anywhere: every span of what is accepted lies inside its batch."""
    records = data.draw(out_records)
    section = bytearray(build(records, now_ms=0, compress=False)[61:])
    for _ in range(data.draw(st.integers(1, 4))):
        section[data.draw(st.integers(0, len(section) - 1))] = data.draw(st.integers(0, 255))
    hostile = with_section(bytes(section), count=len(records), last_delta=len(records) - 1)
    guard = build([OutRecord(b"guard", b"guard")], base_offset=1000, now_ms=0)
    try:
        batch = parsed(hostile + guard)
    except CorruptBatch:
        return
    assert rows_of(batch)[-1][2:4] == (b"guard", b"guard")
    for start, length in ((batch.key_start, batch.key_len), (batch.value_start, batch.value_len)):
        assert (
            (start >= 0) & (length >= -1) & (start + np.maximum(length, 0) <= len(batch.buffer) - BUFFER_SLACK)
        ).all()
        assert (start[:-1] + np.maximum(length[:-1], 0) <= len(section)).all()
    assert (np.diff(batch.offsets) > 0).all()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 7), st.integers(-3, 40))
def test_arbitrary_bytes_never_do_worse_than_a_corrupt_batch(noise: bytes, codec: int, count: int) -> None:
    for data in (noise, with_section(noise, codec=codec, count=count, last_delta=max(count - 1, 0))):
        with contextlib.suppress(CorruptBatch):
            rows_of(parsed(data))


def test_kernels_check_their_indices_themselves(tmp_path: Path) -> None:
    """The hostile tests again, compiled with numba's own bounds checks: a read outside would raise there."""
    arguments = ["-q", "-p", "no:cacheprovider", __file__, "-k", "hostile or corrupt or arbitrary"]
    env = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_warming_up_needs_nothing() -> None:
    recordbatch.warm_up()
