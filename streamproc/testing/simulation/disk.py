"""A worker's disk: the stores of its tasks, which a crash leaves as they were and which can be copied, lost or be old."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

from streamproc.state.contract import Store, StoreMeta, Writes
from streamproc.state.memory import MemoryStore
from streamproc.state.rocksdb import RocksDBStore, open_or_discard
from streamproc.testing.simulation.broker import Weather
from streamproc.testing.simulation.loop import Process
from streamproc.testing.simulation.watch import Watch

__all__ = ["Disk"]


class Disk:
    """``rocksdb`` False: stores in memory, which pass the same contract suite and open faster. `process` is who has it."""

    process: Process

    def __init__(self, folder: Path, weather: Weather, watch: Watch, *, rocksdb: bool) -> None:
        self.folder, self.rocksdb = folder, rocksdb
        self._weather, self._watch = weather, watch
        self._memory: dict[str, MemoryStore] = {}
        self._open: dict[str, SimulatedStore] = {}
        self._standbys: dict[str, None] = {}
        """Stores that a standby had last."""

    def open(self, folder: Path) -> Store:
        """What `App.open_store` does."""
        name = folder.name
        self._watch.require_alive(self.process, "a store's opening")
        self._watch.require(name not in self._open, f"{self.process.name} opened the store {name} twice")
        inner = open_or_discard(self.folder / name) if self.rocksdb else self._memory.setdefault(name, MemoryStore())
        self._open[name] = SimulatedStore(self, name, inner)
        self._note(name, inner.meta() is not None)
        return self._open[name]

    def _note(self, name: str, warm: bool) -> None:
        running = asyncio.current_task()
        standby = running is not None and running.get_name().startswith("standby ")
        if standby:
            self._standbys[name] = None
            self._weather.note("standby opened its store")
        elif warm and name in self._standbys:
            del self._standbys[name]
            self._weather.note("task took over a standby's store")
        else:
            self._weather.note("task opened a store with state" if warm else "task opened an empty store")

    def copy(self, folder: Path) -> Disk:
        """What another process finds that opens these files now: everything that was written, as after kill -9."""
        new = Disk(folder, self._weather, self._watch, rocksdb=self.rocksdb)
        new._memory = {name: _copy(store) for name, store in self._memory.items()}
        if self.rocksdb and self.folder.exists():
            shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("LOCK"))
        return new

    def let_go(self) -> None:
        """Release what a dead process left open."""
        for store in self._open.values():
            if isinstance(store.inner, RocksDBStore):
                store.inner.close()
        self._open.clear()

    def before_write(self, name: str, meta: StoreMeta) -> None:
        group, _, partition = name.rpartition("-")
        self._watch.stored(self.process, (group, int(partition)), meta)
        self._weather.refuse_disk()

    def wiped(self) -> None:
        self._weather.note("store with state wiped")

    def closed(self, name: str) -> None:
        self._open.pop(name, None)


class SimulatedStore:
    """`state.contract.Store`."""

    def __init__(self, disk: Disk, name: str, inner: Store) -> None:
        self._disk, self._name, self.inner = disk, name, inner
        self.meta, self.get, self.get_many = inner.meta, inner.get, inner.get_many
        self.size_bytes = inner.size_bytes

    def scan(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        return self.inner.scan(start, stop)

    def write(self, writes: Writes, meta: StoreMeta) -> None:
        self._disk.before_write(self._name, meta)
        self.inner.write(writes, meta)

    def wipe(self) -> None:
        if self.inner.meta() is not None:
            self._disk.wiped()
        self.inner.wipe()

    def close(self) -> None:
        self.inner.close()
        self._disk.closed(self._name)


def _copy(store: MemoryStore) -> MemoryStore:
    new = MemoryStore()
    rows = list(store.scan(b"", None))
    meta = store.meta()
    if meta is not None:
        new.write(Writes(puts=dict(rows)), meta)
    return new
