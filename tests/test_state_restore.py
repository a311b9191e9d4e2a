"""Changelog records and the restore that replays them: by position, in bounded steps, resumable, no stale rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamproc.avro.recordbatch import split_build
from streamproc.core import limits
from streamproc.core.batch import BUFFER_SLACK, Headers, RawBatch
from streamproc.core.errors import InvariantBroken, LogLost, UserError
from streamproc.core.types import EpochNumber, Offset, TopicPartition
from streamproc.state import changelog
from streamproc.state.changelog import ChangelogRow, Record
from streamproc.state.contract import StoreMeta, Writes
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Change, Changes, table_prefix
from streamproc.state.restore import RestoreProgress, check_store, restore, why_wipe
from streamproc.transport.contract import OutColumns, OutRecord

DAY_MS = 24 * 3600 * 1000
NOW_MS = 1_000 * DAY_MS


class Dead(BaseException):
    """The process dies here."""


@dataclass
class FrozenClock:
    seconds: float = 0.0

    def now_ms(self) -> int:
        return NOW_MS

    def monotonic_s(self) -> float:
        self.seconds += 0.5
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("a restore does not wait")


def varint(value: int) -> bytes:
    word, out = (value << 1) ^ (value >> 63), bytearray()
    while word >= 0x80:
        out.append(word & 0x7F | 0x80)
        word >>= 7
    return bytes([*out, word])


def batch_of(records: list[tuple[int, Record]], topic: str = "log", timestamp_ms: int = NOW_MS) -> RawBatch:
    """Records at their offsets, laid out as in a record batch."""
    data, spans = bytearray(), []
    for _, (key, value, headers, _) in records:
        row = []
        for part in (key, value):
            row += [len(data), -1 if part is None else len(part)]
            data += part or b""
        row.append(len(data))
        data += varint(len(headers))
        for name, content in headers:
            data += varint(len(name)) + name.encode()
            data += varint(-1 if content is None else len(content)) + (content or b"")
        spans.append([*row, len(data)])
    columns = np.array(spans, np.int64).reshape(-1, 6).T
    offsets = np.array([offset for offset, _ in records], np.int64)
    after = Offset(int(offsets[-1]) + 1) if records else Offset(0)
    buffer = np.frombuffer(bytes(data) + bytes(BUFFER_SLACK), np.uint8)
    return RawBatch(TopicPartition(topic, 0), buffer, offsets, np.full(len(records), timestamp_ms), *columns, after)


@dataclass
class Log:
    """Changelogs as a transport reads them: compacted (offsets missing), with markers at the end."""

    topics: dict[str, list[tuple[int, Record]]] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    batch_records: int = 2
    dies_after: int = 1 << 30
    reads: list[tuple[str, int]] = field(default_factory=list)
    timestamp_ms: int = NOW_MS

    def append(self, topic: str, epoch: int, *changes: Change) -> None:
        rows = self.topics.setdefault(topic, [])
        for change in changes:
            rows.append((self.ends.get(topic, 0), changelog.record(change, epoch)))
            self.ends[topic] = self.ends.get(topic, 0) + 1
        self.ends[topic] = self.ends.get(topic, 0) + 1  # the commit marker

    async def read(self, topic: str, start: Offset) -> AsyncIterator[RawBatch]:
        self.reads.append((topic, start))
        rows = [row for row in self.topics[topic] if row[0] >= start]
        for at in range(0, len(rows), self.batch_records):
            self.dies_after -= 1
            if self.dies_after < 0:
                raise Dead
            yield batch_of(rows[at : at + self.batch_records], topic, self.timestamp_ms)

    def restore(
        self, store: MemoryStore, epoch: int, log_id: str = "log"
    ) -> tuple[dict[str, int], list[RestoreProgress]]:
        told: list[RestoreProgress] = []
        tables = {topic: table_prefix(topic) for topic in self.topics}
        targets = {topic: Offset(end) for topic, end in self.ends.items()}
        applied = asyncio.run(
            restore(
                store, tables, self.read, targets, log_id=log_id, epoch=epoch, clock=FrozenClock(), progress=told.append
            )
        )
        return applied, told


def rows_of(store: MemoryStore, topic: str) -> dict[bytes, bytes]:
    prefix = table_prefix(topic)
    return {key[4:]: value for key, value in store.scan(prefix, None) if key.startswith(prefix)}


# ---- records

changes = st.one_of(
    st.builds(Change, st.binary(max_size=5), st.binary(max_size=300), st.none()),
    st.builds(Change, st.binary(max_size=5), st.none(), st.sampled_from(["delete", "expire"])),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(changes, st.integers(0, (1 << 64) - 1)), max_size=8), st.booleans())
def test_records_are_read_as_they_were_written(written: list[tuple[Change, int]], foreign_header: bool) -> None:
    records = [changelog.record(change, epoch) for change, epoch in written]
    if foreign_header:  # a mirroring tool may add its own
        records = [record._replace(headers=(("trace", None), *record.headers)) for record in records]
    read = list(changelog.read(batch_of([(3 * n, record) for n, record in enumerate(records)])))
    assert read == [
        ChangelogRow(change.key, change.value, epoch, change.tombstone, 3 * n)
        for n, (change, epoch) in enumerate(written)
    ]


headers = st.lists(
    st.tuples(
        st.sampled_from(["e", "x", "y", "", "exe"]),
        st.sampled_from([None, b"", b"delete", b"expire", b"delate", bytes(8), b"\xff" * 8, b"\0" * 7 + b"\2"]),
    ),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.builds(Record, st.none() | st.binary(max_size=3), st.none() | st.binary(max_size=3),
                          headers.map(tuple)), max_size=5))  # fmt: skip
@example([Record(b"k", None, (("e", bytes(8)), ("y", b"delete")))])  # as long as a tombstone's
def test_any_headers_are_read_as_one_by_one(records: list[Record]) -> None:
    batch = batch_of(list(enumerate(records)))
    plain = [read_plainly(batch, row) for row in range(len(records))]
    refusals = [said for said in plain if isinstance(said, str)]
    if not refusals:
        assert list(changelog.read(batch)) == plain
        return
    with pytest.raises(UserError) as refused:
        list(changelog.read(batch))
    assert any(why in str(refused.value) for why in refusals)


def read_plainly(batch: RawBatch, row: int) -> ChangelogRow | str:
    """The reference: a row, or why it is none."""
    key, value, named = batch.key(row), batch.value(row), dict(batch.headers(row))
    epoch, how = named.get("e"), named.get("x")
    if key is None:
        return "it has no key"
    if epoch is None or len(epoch) != 8:
        return "it carries no epoch"
    if value is None and how not in (b"delete", b"expire"):
        return "neither delete nor expire"
    tombstone: Any = how.decode() if value is None and how else None
    return ChangelogRow(
        key, value, EpochNumber(int.from_bytes(epoch, "big")), tombstone, Offset(int(batch.offsets[row]))
    )


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.binary(max_size=5), changes, min_size=1, max_size=40), st.integers(0, (1 << 64) - 1))
def test_columns_are_the_records_of_each_change(rows: dict[bytes, Change], epoch: int) -> None:
    one_by_one = [change._replace(key=key) for key, change in sorted(rows.items())]
    gone = {change.key: change.tombstone for change in one_by_one if change.tombstone is not None}
    together = Changes([change.key for change in one_by_one], [change.value for change in one_by_one], gone)
    assert together == one_by_one
    assert [together[n] for n in range(len(together))] == one_by_one
    records = OutColumns(changelog.columns(together, epoch, 5))
    plain = [OutRecord(*changelog.record(change, epoch)) for change in one_by_one]
    assert list(records) == [record._replace(timestamp_ms=5) for record in plain]
    assert split_build(records, now_ms=0) == split_build(plain, now_ms=5)


def test_record_format_is_final() -> None:
    assert changelog.record(Change(b"k", b"v"), 258) == (b"k", b"v", (("e", b"\0\0\0\0\0\0\1\2"),), None)
    tomb = changelog.record(Change(b"k", None, "expire"), 1)
    assert tomb == (b"k", None, (("e", b"\0\0\0\0\0\0\0\1"), ("x", b"expire")), None)


@pytest.mark.parametrize(
    ("key", "value", "headers", "why"),
    [
        (None, b"v", (("e", bytes(8)),), "no key"),
        (b"k", b"v", (), "no epoch"),
        (b"k", b"v", (("e", b"1"),), "no epoch"),
        (b"k", None, (("e", bytes(8)),), "neither delete nor expire"),
        (b"k", None, (("e", bytes(8)), ("x", b"delate")), "neither delete nor expire"),
    ],
)
def test_a_record_of_somebody_else_is_told_with_its_place(
    key: bytes | None, value: bytes | None, headers: Headers, why: str
) -> None:
    record = Record(key, value, headers)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"Changelog log partition 0 holds a record at offset 17 .*{why}"):
        list(changelog.read(batch_of([(17, record)])))


def test_a_row_too_large_for_the_changelog_names_table_and_key() -> None:
    value = bytes(limits.CHANGELOG_RECORD_BYTES_MAX)
    assert changelog.record(Change(b"", value), 1).value == value
    with pytest.raises(UserError, match=r"table carts is too large .* key b'user-1' holds 520,192 bytes"):
        changelog.record(Change(b"user-1", value), 1, table="carts")
    together = Changes([value, b"user-0", b"user-1"], [None, value[:-6], value], {value: "delete"})
    with pytest.raises(UserError, match=r"table carts is too large .* key b'user-1' holds 520,192 bytes"):
        changelog.columns(together, 1, 0, table="carts")


# ---- whether a store may go on


def verdict(meta: StoreMeta | None, **facts: object) -> str | None:
    known = {"log_id": "log", "epoch": 9, "begins": {"a": 5}, "ends": {"a": 50}, "now_ms": NOW_MS, **facts}
    reason = why_wipe(meta, **known)  # type: ignore[arg-type]
    assert check_store(meta, **known) == ("resume" if reason is None else "wipe")  # type: ignore[arg-type]
    return reason


def test_a_fitting_store_goes_on() -> None:
    half = limits.DELETE_RETENTION_MS // 2
    assert verdict(StoreMeta("log", 9, {"a": 5}, NOW_MS)) is None
    assert verdict(StoreMeta("log", 1, {"a": 50}, NOW_MS - half)) is None
    assert verdict(StoreMeta("log", 0, {}, NOW_MS + 5)) is None


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        (None, "new"),
        (StoreMeta("other", 9, {"a": 9}, NOW_MS), "another history"),
        (StoreMeta("log", 10, {"a": 9}, NOW_MS), "ahead of the commit record's 9"),
        (StoreMeta("log", 9, {"a": 4}, NOW_MS), "stands at 4 of a, outside the log's 5 to 50"),
        (StoreMeta("log", 9, {"a": 51}, NOW_MS), "stands at 51 of a"),
        (StoreMeta("log", 9, {"a": 9, "b": 1}, NOW_MS), "no changelog of this task"),
        (StoreMeta("log", 9, {"a": 9}, NOW_MS - limits.DELETE_RETENTION_MS // 2 - 1), "84 hours old"),
    ],
)
def test_a_store_that_does_not_fit_is_wiped(meta: StoreMeta | None, why: str) -> None:
    assert why in (verdict(meta) or "")


# ---- restore


@pytest.fixture
def log() -> Log:
    log = Log()
    log.append("a", 1, Change(b"x", b"1"), Change(b"y", b"1"))
    log.append("a", 2, Change(b"x", None, "delete"), Change(b"z", b"2"))
    log.append("b", 2, Change(b"x", b"other"))
    log.append("a", 3, Change(b"y", None, "expire"), Change(b"x", b"3"))
    return log


def test_restores_rows_positions_epoch_and_time(log: Log) -> None:
    store = MemoryStore()
    applied, _ = log.restore(store, epoch=4)
    assert rows_of(store, "a") == {b"x": b"3", b"z": b"2"}
    assert rows_of(store, "b") == {b"x": b"other"}
    assert applied == {"a": 9, "b": 2}
    assert store.meta() == StoreMeta("log", 4, {"a": 9, "b": 2}, NOW_MS)


def test_restores_from_position_when_tail_is_markers(log: Log) -> None:
    store = MemoryStore()
    log.restore(store, epoch=4)
    log.reads.clear()
    log.ends["a"] += 3  # markers only
    applied, _ = log.restore(store, epoch=4)
    assert log.reads == [("a", 9)]
    assert applied == {"a": 12, "b": 2}


def test_restores_an_empty_changelog_and_a_task_without_tables() -> None:
    store = MemoryStore()
    log = Log(topics={"a": []}, ends={"a": 0})
    assert log.restore(store, epoch=0)[0] == {"a": 0}
    assert store.meta() == StoreMeta("log", 0, {}, NOW_MS)
    assert Log().restore(store, epoch=5)[0] == {}


def test_restore_killed_anywhere_goes_on_from_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESTORE_WRITE_BYTES_MAX", 20)
    log, whole = Log(), MemoryStore()
    for epoch in range(1, 30):
        log.append(
            "a", epoch, Change(b"k%d" % (epoch % 7), b"%d" % epoch), Change(b"k%d" % (epoch % 5), None, "delete")
        )
        log.append("b", epoch, Change(b"n%d" % epoch, b"%d" % epoch))
    log.restore(whole, epoch=29)
    for dies_after in range(0, 45, 3):
        store = MemoryStore()
        log.dies_after = dies_after
        with pytest.raises(Dead):
            log.restore(store, epoch=29)
        assert check_store(store.meta(), log_id="log", epoch=29, begins={"a": 0, "b": 0}, ends=log.ends,
                           now_ms=NOW_MS) == ("resume" if store.meta() else "wipe")  # fmt: skip
        log.dies_after, log.reads = 1 << 30, []
        log.restore(store, epoch=29)
        assert list(store.scan(b"", None)) == list(whole.scan(b"", None))
        assert store.meta() == whole.meta()
        if dies_after > 10:
            assert log.reads[0] != ("a", 0), "what was applied is not read again"


def test_a_restore_broken_off_is_as_old_as_the_records_it_has_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tombstone behind the position may leave the log one retention after it was written, not after it was read past.
    monkeypatch.setattr(limits, "RESTORE_WRITE_BYTES_MAX", 1)
    log, store = Log(batch_records=1, dies_after=2, timestamp_ms=NOW_MS - 30 * DAY_MS), MemoryStore()
    log.append("a", 1, *(Change(b"%d" % n, b"") for n in range(5)))
    with pytest.raises(Dead):
        log.restore(store, epoch=1)
    assert store.meta() == StoreMeta("log", 1, {"a": 2}, NOW_MS - 30 * DAY_MS)
    log.dies_after = 1 << 30
    log.restore(store, epoch=1)
    assert store.meta() == StoreMeta("log", 1, {"a": 6}, NOW_MS)


def test_steps_are_bounded_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESTORE_WRITE_BYTES_MAX", 1_000)
    log, sizes = Log(batch_records=5), list[int]()

    class Watched(MemoryStore):
        def write(self, writes: Writes, meta: StoreMeta) -> None:
            sizes.append(sum(map(len, writes.puts.values())))
            super().write(writes, meta)

    log.append("a", 1, *(Change(b"%04d" % n, bytes(100)) for n in range(100)))
    _, told = log.restore(Watched(), epoch=1)
    assert max(sizes) <= 1_500
    assert [progress.position for progress in told] == [0, *range(10, 101, 10), 101]
    assert [progress.done for progress in told] == [False] * 11 + [True]
    last = told[-1]
    assert (last.topic, last.start, last.target, last.records) == ("a", 0, 101, 100)
    assert last.records_per_s == 100 / last.seconds


def test_an_epoch_ahead_of_the_commit_record_stops_the_worker(log: Log) -> None:
    with pytest.raises(LogLost, match="Changelog a partition 0 holds epoch 3, ahead of the commit record's 2"):
        log.restore(MemoryStore(), epoch=2)


def test_a_store_of_another_history_is_not_restored_over(log: Log) -> None:
    store = MemoryStore()
    log.restore(store, epoch=4)
    with pytest.raises(InvariantBroken):
        log.restore(store, epoch=4, log_id="other")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(changes, max_size=4), max_size=10), st.data())
def test_restore_in_any_steps_equals_the_changes_in_order(epochs: list[list[Change]], data: st.DataObject) -> None:
    log, model = Log(topics={"a": []}, ends={"a": 0}), dict[bytes, bytes]()
    store, batch = MemoryStore(), data.draw(st.integers(1, 5))
    log.batch_records = batch
    for epoch, epoch_changes in enumerate(epochs, 1):
        log.append("a", epoch, *epoch_changes)
        for key, value, _ in epoch_changes:
            model.pop(key, None)
            if value is not None:
                model[key] = value
        if data.draw(st.booleans()):
            log.restore(store, epoch)
            assert rows_of(store, "a") == model
    for row in _superseded(log.topics["a"]):
        log.topics["a"].remove(row)  # compaction
    fresh = MemoryStore()
    log.restore(fresh, len(epochs))
    assert rows_of(fresh, "a") == model


def _superseded(rows: list[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    last = {record.key: offset for offset, record in rows}
    yield from [row for row in rows if last[row[1].key] != row[0]]
