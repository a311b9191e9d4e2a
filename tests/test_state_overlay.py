"""The overlay shows store + epoch as one table, and its changes, replayed anywhere, give that same table."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core.errors import InvariantBroken, UserError
from streamproc.operators.contract import KeyedState
from streamproc.state.contract import StoreMeta, Writes
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Change, Overlay, require_distinct_prefixes, table_prefix, table_stop

META = StoreMeta("log", 1, {}, 0)


def overlay_over(rows: dict[bytes, bytes], table: str = "orders") -> tuple[Overlay, MemoryStore]:
    store = MemoryStore()
    store.write(Writes({table_prefix(table) + key: value for key, value in rows.items()}), META)
    return Overlay(store, table), store


def commit(overlay: Overlay, store: MemoryStore) -> list[Change]:
    changes, writes = overlay.changes(), Writes()
    overlay.writes(writes)
    store.write(writes, META)
    overlay.drop()
    return changes


@dataclass
class Model:
    """A table as a dict, with what an epoch did to it."""

    rows: dict[bytes, bytes]
    tombs: dict[bytes, str] = field(default_factory=dict)

    def do(self, step: tuple[str, bytes, bytes]) -> None:
        verb, key, other = step
        if verb == "put":
            self.rows[key] = other
            self.tombs.pop(key, None)
        elif verb == "delete" and self.rows.pop(key, None) is not None:
            self.tombs[key] = "delete"
        elif verb == "expire":
            for gone in [row for row in self.rows if key <= row < other]:
                del self.rows[gone]
                self.tombs[gone] = "expire"


keys = st.binary(max_size=2).map(lambda key: bytes(byte % 4 for byte in key))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), keys, st.binary(max_size=2)),
        st.tuples(st.just("delete"), keys, st.just(b"")),
        st.tuples(st.just("expire"), keys, keys),
    ),
    max_size=12,
)


def do(state: KeyedState, step: tuple[str, bytes, bytes]) -> None:
    verb, key, other = step
    if verb == "put":
        state.put(key, other)
    elif verb == "delete":
        state.delete(key)
    else:
        state.expire(key, other)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, st.binary(max_size=2)), st.lists(steps, max_size=3), keys, st.none() | keys)
def test_overlay_is_a_dict_over_epochs(
    rows: dict[bytes, bytes], epochs: list[list[tuple[str, bytes, bytes]]], start: bytes, stop: bytes | None
) -> None:
    overlay, store = overlay_over(rows)
    model, replica = dict(rows), dict(rows)
    for epoch in epochs:
        before, now = dict(model), Model(dict(model))
        for step in epoch:
            do(overlay, step)
            now.do(step)
            assert [row for row in overlay.scan(start, stop)] == sorted(
                row for row in now.rows.items() if start <= row[0] and (stop is None or row[0] < stop)
            )
            assert overlay.get(step[1]) == now.rows.get(step[1])
        model = now.rows
        changes = commit(overlay, store)
        assert [change.key for change in changes] == sorted({change.key for change in changes})
        for key, value, tombstone in changes:
            assert (value is None) == (tombstone is not None)
            if value is None:
                replica.pop(key, None)
                assert now.tombs[key] == tombstone
                assert key in before or tombstone == "expire"
            else:
                replica[key] = value
        assert replica == model
        assert dict(overlay.scan(b"", None)) == model
        assert {key[4:]: value for key, value in store.scan(b"", None)} == model


def test_nothing_reaches_the_store_before_writes() -> None:
    overlay, store = overlay_over({b"a": b"1", b"b": b"2"})
    overlay.put(b"a", b"9")
    overlay.delete(b"b")
    overlay.expire(b"", b"z")
    overlay.changes()
    assert [value for _, value in store.scan(b"", None)] == [b"1", b"2"]
    overlay.drop()
    assert list(overlay.scan(b"", None)) == [(b"a", b"1"), (b"b", b"2")]
    assert overlay.changes() == []


def test_a_scan_shows_the_rows_as_they_were_when_it_was_called() -> None:
    overlay, _ = overlay_over({b"a": b"1", b"c": b"3", b"e": b"5"})
    overlay.put(b"d", b"4")
    seen = []
    for key, value in overlay.scan(b"", None):
        seen.append((key, value))
        overlay.put(key + b"!", b"new")
        overlay.put(b"e", b"changed")
        overlay.delete(b"d")
    assert seen == [(b"a", b"1"), (b"c", b"3"), (b"d", b"4"), (b"e", b"5")]


def test_a_key_that_came_and_went_within_the_epoch_is_no_change() -> None:
    overlay, _ = overlay_over({})
    overlay.put(b"a", b"1")
    overlay.delete(b"a")
    overlay.delete(b"never")
    assert overlay.changes() == []


def test_a_stored_key_put_and_deleted_is_a_deletion() -> None:
    overlay, _ = overlay_over({b"a": b"0"})
    overlay.put(b"a", b"1")
    overlay.delete(b"a")
    assert overlay.changes() == [Change(b"a", None, "delete")]


def test_expiry_takes_stored_and_own_rows_and_leaves_later_puts() -> None:
    overlay, store = overlay_over({b"a": b"1", b"b": b"2", b"x": b"9"})
    overlay.put(b"c", b"3")
    overlay.delete(b"a")
    overlay.expire(b"a", b"d")
    overlay.put(b"b", b"again")
    assert commit(overlay, store) == [
        Change(b"a", None, "delete"), Change(b"b", b"again"), Change(b"c", None, "expire")
    ]  # fmt: skip
    assert list(overlay.scan(b"", None)) == [(b"b", b"again"), (b"x", b"9")]


def test_an_expired_row_put_again_and_deleted_is_a_deletion() -> None:
    overlay, store = overlay_over({b"a": b"1"})
    overlay.expire(b"a", b"b")
    overlay.delete(b"a")
    assert overlay.changes() == [Change(b"a", None, "expire")]
    overlay.put(b"a", b"2")
    overlay.delete(b"a")
    assert commit(overlay, store) == [Change(b"a", None, "delete")]


@pytest.mark.parametrize("then", ["nothing", "get", "scan", "put", "delete", "expire"])
def test_rows_put_all_at_once_are_rows_like_any_other(then: str) -> None:
    overlay, store = overlay_over({b"b": b"0", b"x": b"9"})
    before = overlay.size_bytes
    overlay.put_new([b"a", b"b"], [b"1", b"2"])
    assert overlay.size_bytes == before + 4
    wanted: list[Change] = [Change(b"a", b"1"), Change(b"b", b"2")]
    match then:
        case "get":
            assert (overlay.get(b"a"), overlay.get(b"c")) == (b"1", None)
        case "scan":
            assert list(overlay.scan(b"", None)) == [(b"a", b"1"), (b"b", b"2"), (b"x", b"9")]
        case "put":
            overlay.put(b"b", b"3")
            overlay.put_new([b"c"], [b"4"])
            wanted = [Change(b"a", b"1"), Change(b"b", b"3"), Change(b"c", b"4")]
        case "delete":
            overlay.delete(b"b")
            wanted = [Change(b"a", b"1"), Change(b"b", None, "delete")]
        case "expire":
            overlay.expire(b"b", b"y")
            wanted = [Change(b"a", b"1"), Change(b"b", None, "expire"), Change(b"x", None, "expire")]
    replica = {b"b": b"0", b"x": b"9"}
    changes = commit(overlay, store)
    assert changes == wanted
    for key, value, _ in changes:
        replica.pop(key, None)
        replica |= {} if value is None else {key: value}
    assert {key[4:]: value for key, value in store.scan(b"", None)} == replica == dict(overlay.scan(b"", None))
    assert overlay.size_bytes == 0


@pytest.mark.parametrize("before", ["put", "expire"])
def test_rows_put_all_at_once_that_the_epoch_has_changed_before_are_found_out(before: str) -> None:
    overlay, _ = overlay_over({b"a": b"0"})
    overlay.put(b"a", b"1") if before == "put" else overlay.expire(b"a", b"b")
    overlay.put_new([b"a"], [b"2"])
    with pytest.raises(InvariantBroken, match="'orders'"):
        overlay.changes()


def test_rows_put_all_at_once_are_forgotten_with_their_epoch() -> None:
    overlay, _ = overlay_over({})
    overlay.put_new([b"a"], [b"1"])
    overlay.drop()
    assert (overlay.get(b"a"), overlay.changes(), overlay.size_bytes) == (None, [], 0)


def test_expiry_is_a_range_of_the_store_not_a_key_each() -> None:
    overlay, _ = overlay_over({b"%03d" % n: b"" for n in range(100)})
    overlay.expire(b"", b"050")
    writes = Writes()
    overlay.writes(writes)
    prefix = table_prefix("orders")
    assert (writes.ranges, writes.deletes, writes.puts) == ([(prefix, prefix + b"050")], set(), {})


def test_tables_of_one_store_do_not_see_each_other() -> None:
    store = MemoryStore()
    tables = [Overlay(store, name) for name in ("orders", "totals", "zebra")]
    for table in tables:
        table.put(b"a", table.table.encode())
        commit(table, store)
    for table in tables:
        table.put(b"\xff" * 9, b"last")
        assert [value for _, value in table.scan(b"", None)] == [table.table.encode(), b"last"]
    tables[1].expire(b"", b"\xff")
    commit(tables[1], store)
    assert [overlay.get(b"a") for overlay in tables] == [b"orders", None, b"zebra"]


def test_size_is_that_of_the_epoch() -> None:
    overlay, _ = overlay_over({b"aa": b"1"})
    overlay.put(b"aa", b"12345")
    overlay.put(b"aa", b"123")
    assert overlay.size_bytes == 5
    overlay.delete(b"aa")
    assert overlay.size_bytes == 2
    overlay.put(b"aa", b"1")
    assert overlay.size_bytes == 3
    overlay.drop()
    assert overlay.size_bytes == 0


def test_the_last_prefix_has_no_stop() -> None:
    assert table_stop(b"\x00\x00\x00\xff") == b"\x00\x00\x01\x00"
    assert table_stop(b"\xff\xff\xff\xff") is None
    assert table_prefix("123456789") == bytes.fromhex("e3069283"), "the published check value of crc32c"


def test_tables_whose_prefixes_collide_are_refused() -> None:
    require_distinct_prefixes(["orders", "totals", "orders"])
    with pytest.raises(UserError, match="same prefix"):
        require_distinct_prefixes(["orders", *colliding()])


def colliding() -> tuple[str, str]:
    """Two names of one crc32c, found by a birthday search (about 100,000 names)."""
    seen: dict[bytes, str] = {}
    for number in range(1_000_000):
        name = f"table_{number}"
        other = seen.setdefault(table_prefix(name), name)
        if other != name:
            return other, name
    raise AssertionError("no collision among a million names")
