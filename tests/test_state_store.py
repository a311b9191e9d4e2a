"""Both stores pass one contract suite; what only a disk can do wrong is tested here."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from streamproc.core.errors import InvariantBroken, RestoreNeeded, UserError
from streamproc.state.contract import Writes
from streamproc.state.rocksdb import RocksDBStore, destroy, open_or_discard

pytest.register_assert_rewrite("contract.store_suite")
from contract.store_suite import StoreContract, kill_while_writing, meta  # noqa: E402

ROCKS = "from streamproc.state.rocksdb import RocksDBStore as open_store"


class TestMemoryStore(StoreContract):
    code = "from streamproc.state.memory import MemoryStore\ndef open_store(path): return MemoryStore()"


class TestRocksDBStore(StoreContract):
    code = ROCKS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "task-0"


def filled(folder: Path) -> None:
    store = RocksDBStore(folder)
    store.write(Writes({b"key-%05d" % n: b"%d" % n for n in range(2_000)}), meta(7))
    store.close()


def test_reopened_store_holds_what_was_written(folder: Path) -> None:
    filled(folder)
    store = RocksDBStore(folder)
    assert store.meta() == meta(7)
    assert len(list(store.scan(b"", None))) == 2_000
    store.close()


def test_an_acknowledged_epoch_survives_kill_9(folder: Path) -> None:
    acknowledged = kill_while_writing(ROCKS, folder)
    store = RocksDBStore(folder)
    found = store.meta()
    store.close()
    assert found is not None
    assert found.epoch >= acknowledged


def test_a_folder_in_use_by_this_process_is_refused_with_its_path(folder: Path) -> None:
    store = RocksDBStore(folder)
    with pytest.raises(UserError, match=f"{folder} is in use by another store of this process"):
        RocksDBStore(folder)
    store.close()
    RocksDBStore(folder).close()


def test_a_folder_in_use_by_another_process_is_refused_with_its_path(folder: Path) -> None:
    program = (
        f"from pathlib import Path\n{ROCKS}\nstore = open_store(Path({str(folder)!r}))\nprint(1, flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=f"{folder} is in use by another store, of another process"):
            RocksDBStore(folder)
        other.kill()
    RocksDBStore(folder).close()


@pytest.mark.parametrize("damaged", ["CURRENT", "MANIFEST-*"])
def test_a_damaged_folder_asks_for_a_restore_and_names_its_path(folder: Path, damaged: str) -> None:
    filled(folder)
    for path in folder.glob(damaged):
        path.write_bytes(b"garbage garbage")
    with pytest.raises(RestoreNeeded, match=str(folder)):
        RocksDBStore(folder)
    with pytest.raises(RestoreNeeded, match="found damaged"):  # it stays so until somebody discards it
        RocksDBStore(folder)
    store = open_or_discard(folder)
    assert store.meta() is None
    store.close()


def test_a_lost_table_file_asks_for_a_restore(folder: Path) -> None:
    filled(folder)
    RocksDBStore(folder).close()  # moves the write-ahead log into a table file
    tables = list(folder.glob("*.sst"))
    assert tables
    for path in tables:
        path.unlink()
    with pytest.raises(RestoreNeeded, match=str(folder)):
        RocksDBStore(folder)


def test_rows_found_damaged_while_reading_are_not_read_again_after_a_restart(folder: Path) -> None:
    filled(folder)
    RocksDBStore(folder).close()
    for path in folder.glob("*.sst"):
        data = bytearray(path.read_bytes())
        data[10:200] = bytes(190)
        path.write_bytes(data)
    store = RocksDBStore(folder)
    with pytest.raises(RestoreNeeded, match=str(folder)):
        list(store.scan(b"", None))
    store.close()
    with pytest.raises(RestoreNeeded):
        RocksDBStore(folder)


def test_use_after_close_is_a_bug_and_is_told(folder: Path) -> None:
    store = RocksDBStore(folder)
    store.close()
    for use in (store.meta, lambda: store.get(b"key-"), lambda: store.write(Writes(), meta())):
        with pytest.raises(InvariantBroken, match="closed"):
            use()


def test_destroy_removes_the_folder_and_is_idempotent(folder: Path) -> None:
    filled(folder)
    destroy(folder)
    destroy(folder)
    assert os.listdir(folder.parent) == []


def test_a_disk_that_refuses_leaves_the_old_state_and_takes_no_later_epoch(folder: Path) -> None:
    # A limit on the size of files stands for a full disk: it needs no mount and hits the same write.
    program = f"""
import resource, signal
from pathlib import Path
{ROCKS}
from streamproc.state.contract import StoreMeta, Writes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = open_store(Path({str(folder)!r}))
store.write(Writes({{b"key-1": b"old"}}), StoreMeta("log", 1, {{}}, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for rows in ({{b"key-1": bytes(200_000)}}, {{b"key-1": b"small"}}):
    try:
        store.write(Writes(rows), StoreMeta("log", 2, {{}}, 0))
    except OSError as refused:
        print(refused.errno, store.meta().epoch, store.get(b"key-1"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    store.write(Writes(), StoreMeta("log", 3, {{}}, 0))
except OSError as refused:
    print("still refused")
store.close()
store = open_store(Path({str(folder)!r}))
print(store.meta().epoch, store.get(b"key-1"))
store.write(Writes({{b"key-1": b"new"}}), StoreMeta("log", 2, {{}}, 0))
print(store.get(b"key-1"))
store.close()
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [
        "27 1 b'old'", "27 1 b'old'", "still refused", "1 b'old'", "b'new'", ""
    ]  # fmt: skip
