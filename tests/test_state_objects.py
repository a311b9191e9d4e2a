"""A table of Python objects behaves as one dict over all epochs, whatever is in the store and what in the epoch."""

from __future__ import annotations

import enum
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core import limits
from streamproc.core.errors import UserError
from streamproc.state.contract import StoreMeta, Writes
from streamproc.state.kept import ROW_BYTES
from streamproc.state.memory import MemoryStore
from streamproc.state.objects import ObjectOverlay
from streamproc.state.overlay import Change, Changes
from streamproc.state.packing import pack_key, pack_keys, pack_value, pack_values, unpack_key, unpack_value

META = StoreMeta("log", 1, {}, 0)
scalars = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=3) | st.binary(max_size=3)
)
floats = st.floats(allow_nan=False)
keys = st.recursive(scalars | floats, lambda part: st.lists(part, max_size=3).map(tuple), max_leaves=4)
values = st.recursive(
    scalars | floats,
    lambda part: st.one_of(
        st.lists(part, max_size=3),
        st.lists(part, max_size=3).map(tuple),
        st.dictionaries(keys, part, max_size=3),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
    ),
    max_leaves=8,
)


class CountedStore(MemoryStore):
    """Knows how often it was asked for a row."""

    def __init__(self) -> None:
        super().__init__()
        self.gets = 0

    def get(self, key: bytes) -> bytes | None:
        self.gets += 1
        return super().get(key)


def commit(overlay: ObjectOverlay) -> Changes:
    changes, writes = overlay.changes(), Writes()
    overlay.writes(writes)
    overlay._store.write(writes, META)
    overlay.drop()
    return changes


def table(rows: dict[Any, Any] | None = None, **options: Any) -> ObjectOverlay:
    overlay = ObjectOverlay(MemoryStore(), "totals", **options)
    overlay.update(rows or {})
    commit(overlay)
    return overlay


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(left) is not type(right) or left != right:
        return False
    if isinstance(left, dict):
        return all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return all(map(same, left, right))
    return True


@settings(max_examples=200, deadline=None)
@given(values)
def test_values_come_back_type_for_type(value: Any) -> None:
    assert same(unpack_value(pack_value(value, "totals", "key")), value)


@settings(max_examples=200, deadline=None)
@given(keys, keys)
def test_keys_are_equal_exactly_if_their_bytes_are(one: Any, other: Any) -> None:
    assert (pack_key(one, "totals") == pack_key(other, "totals")) == (one == other)
    back = unpack_key(pack_key(one, "totals"))
    assert back == one
    assert hash(back) == hash(one)


@settings(max_examples=200, deadline=None)
@given(st.lists(keys | st.integers() | st.just("\ud800"), max_size=5))
def test_many_are_packed_as_one_by_one(things: list[Any]) -> None:
    assert outcome(pack_keys, things, "t") == outcome(lambda: [pack_key(thing, "t") for thing in things])
    assert outcome(pack_values, things, "t", things) == outcome(lambda: [pack_value(one, "t", one) for one in things])


def outcome(pack: Callable[..., list[bytes]], *given_: Any) -> list[bytes] | str:
    try:
        return pack(*given_)
    except UserError as refused:
        return str(refused)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(0, 300) | keys, scalars))
def test_changes_are_in_the_order_of_their_bytes(rows: dict[Any, Any]) -> None:
    overlay = ObjectOverlay(MemoryStore(), "totals")
    overlay.update(rows)
    expected = sorted((pack_key(key, "t"), pack_value(value, "t", key)) for key, value in rows.items())
    assert [(change.key, change.value) for change in commit(overlay)] == expected
    assert [(key[4:], value) for key, value in overlay._store.scan(b"", None)] == expected


few = st.sampled_from(["a", "b", ("a", 1), 1, 1.0, True, 0.5, b"a", None])
kept_bytes = st.sampled_from([0, 900, limits.TABLE_KEPT_BYTES_MAX])
"""Nothing is kept over the epochs, some rows, all of them."""
verbs = st.sampled_from(["set", "append", "add", "delete", "pop", "setdefault", "get", "clear", "commit", "drop"])
steps = st.lists(st.tuples(verbs, few), max_size=40)


@settings(max_examples=400, deadline=None)
@given(steps, kept_bytes)
def test_table_is_a_dict_over_epochs(history: list[tuple[str, Any]], kept_bytes_max: int) -> None:
    # The model is Python's own: a dict, with the default stored at the first change in place.
    overlay, model = table(default=list, kept_bytes_max=kept_bytes_max), dict[Any, list[Any]]()
    committed = dict[Any, list[Any]]()
    for number, (verb, key) in enumerate(history):
        match verb:
            case "set":
                overlay[key], model[key] = [number], [number]
            case "append":
                overlay[key].append(number)
                model.setdefault(key, []).append(number)
            case "add":
                overlay[key] += [number]
                model[key] = [*model.get(key, []), number]
            case "delete" if key in model:
                del overlay[key], model[key]
            case "pop":
                assert overlay.pop(key, "none") == model.pop(key, "none")
            case "setdefault":
                assert overlay.setdefault(key, [number]) == model.setdefault(key, [number])
            case "get":
                assert overlay.get(key, "none") == model.get(key, "none")
            case "clear" if number % 3 == 0:
                overlay.clear()
                model.clear()
            case "commit":
                commit(overlay)
                committed = {key: list(value) for key, value in model.items()}
            case "drop":
                overlay.drop()
                model = {key: list(value) for key, value in committed.items()}
        assert key in overlay if key in model else key not in overlay
    require_same(overlay, model)


@settings(max_examples=400, deadline=None)
@given(steps, kept_bytes)
def test_a_table_of_numbers_is_a_dict_over_epochs(history: list[tuple[str, Any]], kept_bytes_max: int) -> None:
    overlay, model, committed = table(default=int, kept_bytes_max=kept_bytes_max), dict[Any, Any](), dict[Any, Any]()
    for number, (verb, key) in enumerate(history):
        match verb:
            case "set":
                overlay[key] = model[key] = number
            case "append" | "add":
                overlay[key] += 1
                model[key] = model.get(key, 0) + 1
            case "delete" if key in model:
                del overlay[key], model[key]
            case "pop":
                assert overlay.pop(key, "none") == model.pop(key, "none")
            case "setdefault":
                assert overlay.setdefault(key, number) == model.setdefault(key, number)
            case "get":
                assert overlay.get(key, "none") == model.get(key, "none")
            case "clear" if number % 3 == 0:
                overlay.clear()
                model.clear()
            case "commit":
                commit(overlay)
                committed = dict(model)
            case "drop":
                overlay.drop()
                model = dict(committed)
        assert overlay[key] == model.get(key, 0)
    require_same(overlay, model)


def require_same(overlay: ObjectOverlay, model: dict[Any, Any]) -> None:
    """Within the epoch, and then committed."""
    for _ in range(2):
        assert overlay == model
        assert dict(overlay) == overlay.copy() == model
        assert (len(overlay), bool(overlay)) == (len(model), bool(model))
        assert sorted(map(repr, overlay.values())) == sorted(map(repr, model.values()))
        assert list(overlay) == [key for key, _ in overlay.items()] == list(overlay.keys())
        commit(overlay)
    assert ObjectOverlay(overlay._store, overlay.table) == model


def test_a_committed_value_is_read_from_the_store_once() -> None:
    store = CountedStore()
    old = ObjectOverlay(store, "totals")
    old.update({"a": 1, "b": [2]})
    commit(old)
    rows = ObjectOverlay(store, "totals", int)
    for epoch in range(3):
        rows["a"] += 1
        rows["b"].append(epoch)
        commit(rows)
    assert store.gets == 2
    assert dict(rows) == {"a": 4, "b": [2, 0, 1, 2]}


def test_a_new_key_of_a_table_that_is_all_in_memory_needs_no_store() -> None:
    store = CountedStore()
    rows = ObjectOverlay(store, "totals", int)
    for key in (1, 2, 3):
        rows[key] += 1
        commit(rows)
    assert (store.gets, dict(rows)) == (0, {1: 1, 2: 1, 3: 1})
    del rows[1]
    rows.drop()
    assert rows[1] == 1, "the store is asked: the deletion did not come to a commit"


def test_what_is_kept_of_a_table_is_bounded_by_bytes() -> None:
    bound = 400 * ROW_BYTES
    rows = table({n: n for n in range(1_000)}, default=int, kept_bytes_max=bound)
    for n in range(1_000):
        assert rows[n] == n
        rows[n] += 1
        if n % 100 == 99:
            commit(rows)
        assert (len(rows._kept.young) + len(rows._kept._old)) * ROW_BYTES <= bound
    assert dict(rows) == {n: n + 1 for n in range(1_000)}


def test_counting_reads_the_store_once_and_writes_one_change() -> None:
    counts = table({"a": 5}, default=int)
    counts["a"] += 1
    counts["a"] += 1
    counts["b"] += 1
    assert commit(counts) == [
        Change(pack_key("a", "t"), pack_value(7, "t", "a")), Change(pack_key("b", "t"), pack_value(1, "t", "b"))
    ]  # fmt: skip
    assert dict(counts) == {"a": 7, "b": 1}


def test_missing_key_without_default_is_a_key_error() -> None:
    rows = table({"a": 1})
    with pytest.raises(KeyError, match="b"):
        rows["b"]
    with pytest.raises(KeyError, match="b"):
        del rows["b"]
    with pytest.raises(KeyError, match="b"):
        rows.pop("b")
    del rows["a"]
    with pytest.raises(KeyError, match="a"):
        rows["a"]


def test_reading_a_default_makes_no_row() -> None:
    rows = table(default=list)
    assert rows["a"] == []
    assert table(default=int)["a"] == 0
    assert "a" not in rows
    assert (len(rows), rows.changes()) == (0, [])
    rows["b"] = []
    assert [unpack_key(change.key) for change in commit(rows)] == ["b"]


def test_one_key_reads_as_one_object_within_the_epoch() -> None:
    rows = table({"a": [1]}, default=list)
    assert rows["a"] is rows["a"]
    assert rows["new"] is rows["new"]
    assert dict(rows.items())["a"] is rows["a"]
    assert rows.get("a") is rows["a"]


def test_values_changed_in_place_are_kept_without_assigning_them_back() -> None:
    rows = table({"a": {"n": [1]}, "same": [1]}, default=dict)
    rows["a"]["n"].append(2)
    rows["new"]["n"] = 1
    rows["same"].append(rows["same"].pop())
    assert [unpack_key(change.key) for change in commit(rows)] == ["a", "new"]
    assert dict(rows) == {"a": {"n": [1, 2]}, "new": {"n": 1}, "same": [1]}


def test_objects_of_an_earlier_epoch_are_the_callers_own() -> None:
    rows = table({"a": [1]})
    mine = rows["a"]
    commit(rows)
    mine.append(2)
    assert rows.changes() == []
    assert rows["a"] == [1]


def test_a_dropped_epoch_leaves_nothing() -> None:
    rows = table({"a": [1]}, default=list)
    rows["a"].append(2)
    rows["b"] = [3]
    del rows["a"]
    rows.drop()
    assert (rows.changes(), rows.size_bytes) == ([], 0)
    assert dict(rows) == {"a": [1]}


def test_deleting_a_row_that_never_was_committed_is_no_change() -> None:
    rows = table({"old": 1})
    rows["new"] = 1
    del rows["new"], rows["old"]
    assert commit(rows) == [Change(pack_key("old", "t"), None, "delete")]
    assert not rows


def test_rows_may_be_changed_and_deleted_while_they_are_walked() -> None:
    rows = table({n: n for n in range(5)})
    seen = []
    for key, value in rows.items():
        seen.append(value)
        rows[key] = value * 10
        rows.pop(key + 1, None)
    assert seen == [0, 2, 4]
    assert dict(rows) == {0: 0, 2: 20, 4: 40}


def test_iteration_order_does_not_depend_on_the_order_of_writing() -> None:
    one, other = table(), table({"b": 2, "c": 3})
    one.update({"c": 3, "a": 1, "b": 2})
    other["a"] = 1
    assert list(one.items()) == list(other.items())
    assert list(reversed(one)) == list(one)[::-1]
    assert one.popitem() == ("c", 3)


def test_numpy_floats_are_floats() -> None:
    rows = table({"a": np.float64(1.5)})
    assert type(rows["a"]) is float


class Colour(enum.Enum):
    RED = 1


nested: list[Any] = []
nested.append(nested)


@pytest.mark.parametrize(
    ("value", "what", "remedy"),
    [
        (1 << 64, "an integer beyond 64 bits", r"str\(number\)"),
        ([1, {"a": -(1 << 63) - 1}], "an integer beyond 64 bits", r"str\(number\)"),
        (Decimal(1), "decimal.Decimal", "Store text"),
        ((datetime(2013, 1, 1),), "datetime.datetime", "Store text"),
        (Colour.RED, "Colour", "Store text"),
        (np.int64(1), "numpy.int64", "Store text"),
        ({Colour.RED: 1}, "a dict with a key of type", "Use text"),
        (bytearray(b"a"), "bytearray", "Store text"),
        ("\ud800", "lone surrogates", "bytes"),
        (nested, "contains itself", "flatter"),
    ],
)  # fmt: skip
def test_unsupported_values_name_table_key_type_and_remedy(value: Any, what: str, remedy: str) -> None:
    rows = table()
    rows["some key"] = value
    with pytest.raises(UserError, match=f"Table totals: the value of key 'some key' holds .*{what}.*{remedy}"):
        rows.changes()


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (1 << 64, "64 bits"),
        (float("nan"), "NaN"),
        (("a", Decimal(1)), "decimal.Decimal"),
        (frozenset("a"), "frozenset"),
    ],
)
def test_unsupported_keys_are_refused_at_the_first_use(key: Any, what: str) -> None:
    with pytest.raises(UserError, match=f"Table totals: the key .*{what}"):
        table(default=int)[key] += 1
