"""What every store must do, whatever is behind it.

A binding is a test module of a few lines:

    pytest.register_assert_rewrite("contract.store_suite")
    from contract.store_suite import StoreContract

    class TestMine(StoreContract):
        code = "from streamproc.state.mine import MyStore as open_store"     # also run in a process that is killed

``code`` defines ``open_store(path)``; the same path opens the same store, as far as it keeps anything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamproc.core.errors import InvariantBroken
from streamproc.state.contract import Run, Store, StoreMeta, Writes

__all__ = ["StoreContract", "meta"]

keys = st.binary(min_size=4, max_size=6).map(lambda key: bytes(byte % 3 for byte in key))


def run_of(rows: dict[bytes, bytes]) -> Run:
    return Run(sorted(rows), [rows[key] for key in sorted(rows)])


steps = st.builds(
    Writes,
    puts=st.dictionaries(keys, st.binary(max_size=4), max_size=12),
    deletes=st.sets(keys, max_size=4),
    ranges=st.lists(st.tuples(keys, keys), max_size=2),
    runs=st.lists(st.dictionaries(keys, st.binary(max_size=4), max_size=8).map(run_of), max_size=2),
)

KILLED = """
import sys
from pathlib import Path
{code}
from streamproc.state.contract import Run, StoreMeta, Writes
store = open_store(Path({path!r}))
for epoch in range(1, 10_000_000):
    rows = {{b"row-%05d" % n: b"%d" % epoch for n in range(500)}}
    store.write(Writes(rows), StoreMeta("log", epoch, {{"changelog": epoch * 500}}, epoch))
    print(epoch, flush=True)
"""


def meta(epoch: int = 1, log_id: str = "log") -> StoreMeta:
    return StoreMeta(log_id, epoch, {"changelog": 10 * epoch}, 1_000 * epoch)


def apply_plainly(rows: dict[bytes, bytes], writes: Writes) -> None:
    """First the ranges, then the deletes, then the puts."""
    for start, stop in writes.ranges:
        for key in [key for key in rows if start <= key < stop]:
            del rows[key]
    for key in writes.deletes:
        rows.pop(key, None)
    rows.update(writes.puts)
    for run in writes.runs:
        rows.update(zip(run.keys, run.values, strict=True))


class StoreContract:
    code: str

    @pytest.fixture
    def open_store(self) -> Callable[[Path], Store]:
        names: dict[str, Any] = {}
        exec(self.code, names)
        opened: Callable[[Path], Store] = names["open_store"]
        return opened

    @pytest.fixture
    def store(self, open_store: Callable[[Path], Store], tmp_path: Path) -> Iterator[Store]:
        store = open_store(tmp_path / "store")
        yield store
        store.close()

    def test_new_store_is_empty_and_has_no_meta(self, store: Store) -> None:
        assert store.meta() is None
        assert list(store.scan(b"", None)) == []
        assert store.get(b"key-") is None

    def test_rows_and_meta_are_written_together(self, store: Store) -> None:
        store.write(Writes({b"key-b": b"2", b"key-a": b""}), meta(3))
        assert store.meta() == meta(3)
        assert store.get(b"key-a") == b""
        assert store.get_many([b"key-b", b"key-", b"key-a"]) == [b"2", None, b""]
        assert store.get_many([]) == []

    def test_meta_is_no_row(self, store: Store) -> None:
        store.write(Writes({b"\x00\x00\x00\x00": b"first"}), meta())
        assert list(store.scan(b"", None)) == [(b"\x00\x00\x00\x00", b"first")]
        store.write(Writes(ranges=[(b"", b"\xff" * 8)]), meta(2))
        assert store.meta() == meta(2)
        assert list(store.scan(b"", None)) == []

    def test_scan_is_in_byte_order_and_half_open(self, store: Store) -> None:
        names = [b"key-\x00", b"key-\x7f", b"key-\x80", b"key-\xff", b"key-\xff\x00"]
        store.write(Writes({name: name for name in reversed(names)}), meta())
        assert [key for key, _ in store.scan(b"key-", None)] == names
        assert [key for key, _ in store.scan(b"key-\x7f", b"key-\xff")] == names[1:3]
        assert list(store.scan(b"key-\xff", b"key-\x00")) == []

    def test_scan_of_many_rows_gives_each_once(self, store: Store) -> None:
        rows = {b"key-%06d" % n: b"%d" % n for n in range(3_001)}
        store.write(Writes(dict(rows)), meta())
        assert list(store.scan(b"key-", b"key.")) == list(rows.items())

    def test_scan_left_half_way_does_not_keep_the_store_open(
        self, open_store: Callable[[Path], Store], tmp_path: Path
    ) -> None:
        first = open_store(tmp_path / "store")
        first.write(Writes({b"key-%d" % n: b"" for n in range(10)}), meta())
        rows = first.scan(b"", None)
        next(rows)
        first.close()
        second = open_store(tmp_path / "store")
        second.close()

    def test_ranges_come_before_deletes_before_puts(self, store: Store) -> None:
        store.write(Writes({b"key-1": b"old", b"key-2": b"old", b"key-3": b"old"}), meta(1))
        both = Writes({b"key-2": b"new"}, {b"key-2", b"key-3", b"none"}, [(b"key-1", b"key-3"), (b"z", b"a")])
        store.write(both, meta(2))
        assert list(store.scan(b"", None)) == [(b"key-2", b"new")]

    def test_empty_write_moves_the_meta(self, store: Store) -> None:
        store.write(Writes(), meta(1))
        store.write(Writes(), meta(2))
        assert store.meta() == meta(2)

    def test_wipe_drops_rows_and_meta_and_leaves_a_usable_store(self, store: Store) -> None:
        store.write(Writes({b"key-1": b"old"}), meta(5))
        store.wipe()
        assert store.meta() is None
        assert list(store.scan(b"", None)) == []
        store.write(Writes({b"key-2": b"new"}), meta(1))
        assert list(store.scan(b"", None)) == [(b"key-2", b"new")]

    def test_size_grows_with_the_rows(self, store: Store) -> None:
        before = store.size_bytes()
        store.write(Writes({b"key-%04d" % n: os.urandom(1_000) for n in range(1_000)}), meta())
        assert store.size_bytes() - before > 500_000

    def test_close_is_idempotent(self, store: Store) -> None:
        store.close()
        store.close()

    def test_keys_of_the_meta_are_refused(self, store: Store) -> None:
        with pytest.raises(InvariantBroken):
            store.write(Writes({b"\x00": b"mine"}), meta())

    # The test is inherited by each binding, and wipes what the example before it left.
    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(st.lists(steps, max_size=5))
    def test_any_writes_leave_what_a_dict_would_hold(self, store: Store, history: list[Writes]) -> None:
        store.wipe()
        rows: dict[bytes, bytes] = {}
        for epoch, writes in enumerate(history, 1):
            store.write(writes, meta(epoch))
            apply_plainly(rows, writes)
            assert list(store.scan(b"", None)) == sorted(rows.items())
            assert store.get_many(list(writes.deletes)) == [rows.get(key) for key in writes.deletes]

    def test_kill_9_leaves_an_epoch_whole_or_absent(self, open_store: Callable[[Path], Store], tmp_path: Path) -> None:
        acknowledged = kill_while_writing(self.code, tmp_path / "store")
        assert acknowledged > 20
        store = open_store(tmp_path / "store")
        found, rows = store.meta(), list(store.scan(b"", None))
        store.close()
        if found is None:
            assert rows == []
        else:
            assert found.applied == {"changelog": found.epoch * 500}
            assert rows == [(b"row-%05d" % n, b"%d" % found.epoch) for n in range(500)]


def kill_while_writing(code: str, path: Path) -> int:
    """Kill a process in the middle of its writes; the last epoch that it said was written."""
    program = KILLED.format(code=code, path=str(path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > 20:
                break
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
    # The last line may be cut short by the kill.
    return max([int(line), *(int(number) for number in rest[:-1] if number)])
